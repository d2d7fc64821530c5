from dataclasses import replace

import pytest

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.data.collate import collate
from meteor.data.indexed_images import IndexedImage, IndexedImages
from meteor.data.sample_sets import SampleSet
from meteor.data.samples import Sample, SampleProblem
from meteor.data.table import SampleTable
from meteor.data.table_plan import plan_table
from meteor.data.token_table import TokenTable
from meteor.errors import DataError
from meteor.image.budget import visual_token_budget
from meteor.image.pixels import PixelSettings
from meteor.text.batches import TokenBatch
from meteor.text.conversation import Turn
from meteor.text.tokenizer import VisualTokens
from meteor.text.tokens import TokenisedSample

V, X = IMAGE_PLACE, IGNORE_INDEX
PIXELS = PixelSettings(resolution=56, max_aspect_ratio=8)
# At 56 pixels a square is one sub-image of 4 x 4 patches; twice as wide is two slices and a global view of 2 x 5.
IMAGES = {
    "square": IndexedImage("k-square", 56, 56, ""),
    "wide": IndexedImage("k-wide", 112, 56, ""),
    "broken": IndexedImage("k-broken", 56, 56, "truncated"),
    "strip": IndexedImage("k-strip", 900, 100, ""),
}


def make_sample(sample_id, *images, question=4, answer=3):
    turns = (Turn("human", "q" * question, len(images)), Turn("gpt", "a" * answer))
    return Sample(sample_id, images, turns)


def tokenise(sample):
    """<s>, the images, 10 for each letter of the question, 20 for each of the answer, </s>."""
    question, answer = (turn.text for turn in sample.turns)
    ids = [1, *[V] * len(sample.images), *[10] * len(question), *[20] * len(answer), 2]
    num_labels = len(answer) + 1
    return TokenisedSample(ids, [X] * (len(ids) - num_labels) + ids[-num_labels:])


def make_tokens(samples, uri=None):
    """The table of `tokenise`; a sample without an answer has a problem."""
    batch = TokenBatch.of([tokenise(sample) for sample in samples])
    problems = [None if sample.turns[1].text else " has no answer" for sample in samples]
    batches = [replace(batch, problems=problems)]
    return TokenTable.of(batches) if uri is None else TokenTable.write(uri, batches)


def make_plan(
    samples, *, k=4, projector="meteor", problems=(), max_length=100, sub_images="all", images=IMAGES, tokens_uri=None
):
    settings = {"k": k} if projector == "meteor" else {}
    return plan_table(
        SampleSet.of("samples", samples, problems),
        make_tokens(samples, tokens_uri),
        IndexedImages.of(images),
        budget=visual_token_budget(projector, settings),
        pixels=PIXELS,
        max_length=max_length,
        sub_images=sub_images,
    )


def test_rows_hold_tokens_labels_keys_and_lengths():
    table = make_plan([make_sample("a", "square"), make_sample("b"), make_sample("c", "wide", "square")]).table
    assert (len(table), table.sample_ids) == (3, ["a", "b", "c"])
    assert table.tokens(0) == TokenisedSample([1, V, 10, 10, 10, 10, 20, 20, 20, 2], [X, X, X, X, X, X, 20, 20, 20, 2])
    assert [table.image_keys(i) for i in range(3)] == [["k-square"], [], ["k-wide", "k-square"]]
    assert [table.num_answer_tokens(i) for i in range(3)] == [4, 4, 4]
    # 9 text tokens, and 144 a sub-image.
    assert table.grouping_lengths == [9 + 144, 9, 9 + 4 * 144]


def test_totals_count_separators_as_text():
    table = make_plan([make_sample("a", "square"), make_sample("b"), make_sample("c", "wide", "square")]).table
    assert table.totals() == {
        "samples": 3,
        "sub_images": 1 + 3 + 1,
        "visual_tokens": 5 * 4,
        "text_tokens": 3 * 9 + 2,
        "images": 3,
        "distinct_images": 2,
    }


@pytest.mark.parametrize("sub_images", ["all", "global"])
def test_totals_are_those_of_the_batches_trained_on(make_features, sub_images):
    images = {"a": IndexedImage("k", 112, 56, ""), "b": IndexedImage("l", 56, 56, "")}
    table = make_plan([make_sample("a", "a", "b"), make_sample("b", "b")], images=images, sub_images=sub_images).table
    # The fixture's images have as many sub-images as the plan's, and more patches than k each.
    features = {"k": make_features("k", sliced=True), "l": make_features("l")}
    batches = [
        collate(
            [[(table.tokens(i), [features[key] for key in table.image_keys(i)])]],
            budget=visual_token_budget("meteor", {"k": 4}),
            visual_tokens=VisualTokens(32000, 3, 4),
            pad_id=0,
            vision_width=16,
            select_layer=-2,
            sub_images=sub_images,
        )
        for i in range(2)
    ]
    totals = table.totals()
    assert totals["visual_tokens"] == sum(batch.num_visual_tokens for batch in batches)
    assert totals["text_tokens"] == sum(batch.num_text_tokens for batch in batches)
    assert totals["sub_images"] == sum(len(batch.grids) for batch in batches)


def test_every_sample_that_cannot_be_used_is_listed_with_its_reason():
    samples = [
        make_sample("good", "square"),
        make_sample("quarantined", "square", "broken"),
        make_sample("long", "strip"),
        make_sample("mute", answer=0),
    ]
    plan = make_plan(samples, problems=[SampleProblem("odd", "turn_order", "turn 1 is from 'human'")])
    assert plan.table.sample_ids == ["good"]
    assert [(one.sample_id, one.reason) for one in plan.excluded] == [
        ("odd", "turn_order"),
        ("quarantined", "truncated"),
        ("long", "aspect_ratio"),
        ("mute", "tokenisation"),
    ]
    assert "'broken' is quarantined" in plan.excluded[1].message
    assert "900x100" in plan.excluded[2].message
    assert plan.reasons() == {"turn_order": 1, "truncated": 1, "aspect_ratio": 1, "tokenisation": 1}


def test_text_is_cut_to_the_room_that_images_leave():
    # The wide image takes 3 x 4 slots and 2 separators: of 9 text tokens 7 fit into 21, two of them of the answer.
    plan = make_plan([make_sample("a", "wide"), make_sample("b")], max_length=21)
    assert plan.table.tokens(0) == TokenisedSample([1, V, *[10] * 4, 20, 20], [*[X] * 6, 20, 20])
    assert (plan.num_cut, plan.excluded) == (1, ())
    assert plan.table.num_answer_tokens(0) == 2
    # What decides about batches is the length before the cut.
    assert plan.table.grouping_lengths == [9 + 3 * 144, 9]


def test_a_sample_as_long_as_the_limit_stays_whole():
    plan = make_plan([make_sample("a", "wide")], max_length=23)
    assert (plan.num_cut, len(plan.table.tokens(0).input_ids)) == (0, 10)
    assert make_plan([make_sample("a", "wide")], max_length=22).num_cut == 1


@pytest.mark.parametrize("max_length", [19, 12, 8])
def test_a_sample_without_room_for_an_answer_is_excluded_and_not_counted_as_cut(max_length):
    plan = make_plan([make_sample("a", "wide"), make_sample("b", answer=1, question=1)], max_length=max_length)
    assert plan.table.sample_ids == ["b"]
    assert plan.reasons() == {"too_long": 1}
    assert f"14 of {max_length} tokens" in plan.excluded[0].message
    assert plan.num_cut == 0


def test_grouping_lengths_depend_on_neither_projector_nor_the_sub_images_trained_on():
    samples = [make_sample("a", "wide", "square"), make_sample("b", "square", question=7), make_sample("c")]
    plans = [
        make_plan(samples),
        make_plan(samples, k=1),
        make_plan(samples, projector="mlp"),
        make_plan(samples, sub_images="global"),
        make_plan(samples, k=1, max_length=12),
    ]
    assert [plan.table.grouping_lengths for plan in plans] == [[9 + 4 * 144, 12 + 144, 9]] * len(plans)
    assert [plan.table.totals()["visual_tokens"] for plan in plans] == [20, 5, 10 + 16 * 4, 12, 5]
    assert [plan.num_cut for plan in plans] == [0, 0, 0, 0, 2]


def test_a_table_reads_back_as_it_was_written(tmp_path):
    samples = [make_sample("a", "square"), make_sample("b"), make_sample("c", "wide", "square")]
    written = make_plan(samples, tokens_uri=str(tmp_path / "tokens.arrow")).table
    written.write(str(tmp_path / "samples.parquet"))
    read = SampleTable.read(str(tmp_path / "samples.parquet"))
    assert [read.tokens(i) for i in range(3)] == [written.tokens(i) for i in range(3)]
    assert [read.image_keys(i) for i in range(3)] == [written.image_keys(i) for i in range(3)]
    assert [read.num_answer_tokens(i) for i in range(3)] == [4, 4, 4]
    assert (read.grouping_lengths, read.sample_ids) == (written.grouping_lengths, written.sample_ids)
    assert read.totals() == written.totals()


def test_a_table_may_be_empty(tmp_path):
    make_plan([], tokens_uri=str(tmp_path / "tokens.arrow")).table.write(str(tmp_path / "samples.parquet"))
    read = SampleTable.read(str(tmp_path / "samples.parquet"))
    assert (len(read), len(read.flat_image_keys()), read.totals()["text_tokens"]) == (0, 0, 0)


def test_an_image_that_was_never_indexed_is_an_error():
    with pytest.raises(DataError, match=r"sample 'a': image 'new' is not in the dataset index"):
        make_plan([make_sample("a", "new")])
