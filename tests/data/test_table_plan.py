"""Plans made over columns are those made sample by sample, and token tables give back what went in."""

import multiprocessing
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meteor.constants import GROUPING_TOKENS_PER_SUB_IMAGE, IGNORE_INDEX, IMAGE_PLACE
from meteor.data import sample_sets, token_table
from meteor.data.collate import ImageLayout, num_image_tokens
from meteor.data.indexed_images import IndexedImage, IndexedImages
from meteor.data.sample_sets import SampleSet
from meteor.data.samples import Sample, SampleProblem
from meteor.data.table import SampleTable
from meteor.data.table_plan import Exclusion, TablePlan, plan_table
from meteor.data.token_table import TokenTable, tokenise_set, tokenizer_fingerprint
from meteor.errors import BadImageError, DataError, TokenisationError
from meteor.image.budget import visual_token_budget
from meteor.image.pixels import PixelSettings
from meteor.text.batches import TokenBatch
from meteor.text.conversation import Turn
from meteor.text.tokenizer import load_tokenizer
from meteor.text.tokens import TokenisedSample, tokenise

PIXELS = PixelSettings(resolution=56, max_aspect_ratio=8)
IMAGES = {
    "square": IndexedImage("k-square", 56, 56, ""),
    "copy": IndexedImage("k-square", 56, 56, ""),
    "wide": IndexedImage("k-wide", 112, 56, ""),
    "tall": IndexedImage("k-tall", 60, 190, ""),
    "broken": IndexedImage("", 0, 0, "truncated"),
    "strip": IndexedImage("k-strip", 900, 100, ""),
}
V, X = IMAGE_PLACE, IGNORE_INDEX
WORDS = st.sampled_from(["a", "the cats", "red  table\n", "what is it?", "😀", "ASSISTANT: no", ""])


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@st.composite
def samples(draw):
    turns, images = [], []
    for _ in range(draw(st.integers(1, 3))):
        shown = draw(
            st.lists(
                st.sampled_from([*IMAGES, "unknown"] if draw(st.integers(0, 30)) == 0 else list(IMAGES)), max_size=2
            )
        )
        words = " ".join(draw(st.lists(WORDS, max_size=6)))
        turns += [Turn("human", words.strip(), len(shown)), Turn("gpt", " ".join(draw(st.lists(WORDS, max_size=6))))]
        images += shown
    return tuple(images), tuple(turns)


def cut_text(sample, max_text_tokens):
    """One token after the other; images are never cut, not even those behind the limit."""
    kept, num_text = TokenisedSample([], [], []), 0
    for token, label, turn in zip(sample.input_ids, sample.labels, sample.turns, strict=True):
        num_text += token != IMAGE_PLACE
        if token == IMAGE_PLACE or num_text <= max_text_tokens:
            kept.input_ids.append(token)
            kept.labels.append(label)
            kept.turns.append(turn)
    return kept


def slow_plan(samples, problems, images, *, tokenise, budget, pixels, max_length, sub_images):
    """One sample after the other: exclusions, rows, and how many were cut."""
    excluded = [Exclusion(one.sample_id, one.reason, one.message) for one in problems]
    rows, num_cut = [], 0
    for sample in samples:
        try:
            layouts = [slow_layout(sample, name, images, pixels) for name in sample.images]
        except BadImageError as error:
            excluded.append(Exclusion(sample.id, error.reason, str(error)))
            continue
        used = [layout.only_global() for layout in layouts] if sub_images == "global" else layouts
        image_length = sum(num_image_tokens(layout, budget) for layout in used)
        try:
            tokens = tokenise(sample)
        except TokenisationError as error:
            excluded.append(Exclusion(sample.id, "tokenisation", str(error)))
            continue
        num_text = len(tokens.input_ids) - len(layouts)
        grouping_length = num_text + GROUPING_TOKENS_PER_SUB_IMAGE * sum(len(layout.patch_grids) for layout in layouts)
        is_cut = num_text + image_length > max_length
        if is_cut:
            tokens = cut_text(tokens, max_length - image_length)
            if all(label == IGNORE_INDEX for label in tokens.labels):
                message = (
                    f"its images take {image_length} of {max_length} tokens and its question the rest: no room for an "
                    "answer; raise max_length or keep fewer visual tokens"
                )
                excluded.append(Exclusion(sample.id, "too_long", message))
                continue
        num_cut += is_cut
        counts = [count for layout in used for count in budget(layout.patch_grids)]
        rows.append(
            {
                "id": sample.id,
                "tokens": tokens,
                "turns": tokens.turns,
                "keys": [images[name].image_key for name in sample.images],
                "sub_images": sum(count > 0 for count in counts),
                "answers": sum(label != IGNORE_INDEX for label in tokens.labels),
                "visual": sum(counts),
                "length": len(tokens.input_ids) - len(layouts) + image_length,
                "grouping_length": grouping_length,
            }
        )
    return tuple(excluded), rows, num_cut


def slow_layout(sample, name, images, pixels):
    image = images.get(name)
    if image is None:
        raise DataError(f"sample {sample.id!r}: image {name!r} is not in the dataset index; run cache_features first")
    if image.reason:
        raise BadImageError(image.reason, f"image {name!r} is quarantined: {image.reason}")
    plan = pixels.plan(image.width, image.height)
    return ImageLayout(plan.grid, plan.patch_grids)


def rows_of(table):
    return [
        {
            "id": table.sample_ids[i],
            "tokens": table.tokens(i),
            "turns": table.tokens(i).turns,
            "keys": table.image_keys(i),
            "sub_images": table.num_sub_images[i],
            "answers": table.num_answer_tokens(i),
            "length": table.lengths[i],
            "grouping_length": table.grouping_lengths[i],
        }
        for i in range(len(table))
    ]


@settings(max_examples=150, deadline=None)
@given(
    drawn=st.lists(samples(), max_size=6),
    max_length=st.sampled_from([8, 20, 40, 80, 1000]),
    projector=st.sampled_from(["meteor", "mlp", "global_view"]),
    sub_images=st.sampled_from(["all", "global"]),
    template=st.sampled_from(["vicuna_v1", "plain"]),
)
def test_a_plan_is_the_one_made_sample_by_sample(tokenizer, drawn, max_length, projector, sub_images, template):
    given_samples = [Sample(f"s{i}", images, turns) for i, (images, turns) in enumerate(drawn)]
    problems = [SampleProblem("odd", "bad_turn", "turn 0 is odd")]
    common = {
        "budget": visual_token_budget(projector, {"k": 4} if projector == "meteor" else {}),
        "pixels": PIXELS,
        "max_length": max_length,
        "sub_images": sub_images,
    }

    def one_by_one(sample):
        return tokenise(sample.conversation, tokenizer, template, sample_id=sample.id)

    sample_set = SampleSet.of("a", given_samples, problems)
    tokens = tokenise_set(sample_set, tokenizer, template)
    try:
        excluded, rows, num_cut = slow_plan(given_samples, problems, IMAGES, tokenise=one_by_one, **common)
    except DataError as error:
        message = str(error)
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
            plan_table(sample_set, tokens, IndexedImages.of(IMAGES), **common)
        return
    plan = plan_table(sample_set, tokens, IndexedImages.of(IMAGES), **common)
    assert (plan.excluded, plan.num_cut) == (excluded, num_cut)
    assert plan.table.totals()["visual_tokens"] == sum(row.pop("visual") for row in rows)
    assert rows_of(plan.table) == rows
    assert plan.table.totals()["text_tokens"] + plan.table.totals()["visual_tokens"] == sum(
        row["length"] for row in rows
    )


def test_images_that_the_encoder_refused_have_its_reason():
    rows = pa.table(
        {
            "name": ["a", "b", "c"],
            "image_key": ["k1", "k2", "k1"],
            "width": [56, 56, 56],
            "height": [56, 56, 56],
            "reason": ["", "", "truncated"],
        }
    )
    assert IndexedImages.from_rows(rows, {"k1": "not_finite"}).reasons.to_pylist() == ["not_finite", "", "truncated"]
    assert IndexedImages.from_rows(rows, {}).reasons.to_pylist() == ["", "", "truncated"]


def make_sample(i):
    images = [f"{i}.jpg"] * (i % 3)
    turns = (Turn("human", "what is there? " * (i % 4 + 1), len(images)), Turn("gpt", f"{i} cats" if i % 5 else ""))
    return Sample(f"s{i}", tuple(images), turns)


@pytest.mark.parametrize(
    ("limit", "ids", "labels", "turns"),
    [
        (9, [1, V, 5, 6, V, 7, 8], [X, X, X, X, X, 7, 8], [0, 1, 0, 0, 2, 2, 2]),
        (5, [1, V, 5, 6, V, 7, 8], [X, X, X, X, X, 7, 8], [0, 1, 0, 0, 2, 2, 2]),
        (4, [1, V, 5, 6, V, 7], [X, X, X, X, X, 7], [0, 1, 0, 0, 2, 2]),
        (2, [1, V, 5, V], [X, X, X, X], [0, 1, 0, 2]),
        (0, [V, V], [X, X], [1, 2]),
        (-3, [V, V], [X, X], [1, 2]),
    ],
)
def test_cutting_text_drops_its_end_and_never_an_image(limit, ids, labels, turns):
    sample = TokenisedSample([1, V, 5, 6, V, 7, 8], [X, X, X, X, X, 7, 8], [0, 1, 0, 0, 2, 2, 2])
    table = TokenTable.of([TokenBatch.of([sample])])
    cut = table.row(0, limit)
    assert (cut, cut.turns) == (TokenisedSample(ids, labels), turns)
    assert cut == cut_text(sample, limit)
    assert table.num_answer_tokens(0, limit) == sum(label != X for label in labels)


@pytest.mark.filterwarnings("ignore")
def test_many_samples_are_tokenised_by_processes_in_their_order(tokenizer, monkeypatch):
    monkeypatch.setattr(sample_sets, "_BATCH_SIZE", 2)
    samples = SampleSet.of("a", [make_sample(i) for i in range(24)]).select(range(1, 23))
    expected = tokenise_set(samples, tokenizer, "plain")
    monkeypatch.setattr(token_table, "_MIN_FOR_PROCESSES", 22)
    found = tokenise_set(samples, tokenizer, "plain")
    assert [found.row(i) for i in range(22)] == [expected.row(i) for i in range(22)]
    assert found.lengths.problems == expected.lengths.problems != {}
    assert multiprocessing.active_children() == []


def test_tokens_are_computed_once_for_what_decides_about_them(tokenizer, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_sets, "_BATCH_SIZE", 4)
    one = SampleSet.of("a", [make_sample(i) for i in range(10)], digest="d")
    folder, progress = str(tmp_path), []
    stored = tokenise_set(one, tokenizer, "vicuna_v1", folder=folder, on_progress=lambda *done: progress.append(done))
    assert progress == [(4, 10), (8, 10), (10, 10)]
    truth = [tokenise(sample.conversation, tokenizer, "vicuna_v1") for sample in one]
    assert [stored.row(i) for i in range(10)] == truth
    assert [stored.row(i).turns for i in range(10)] == [sample.turns for sample in truth]
    monkeypatch.setattr(token_table, "_tokenise", lambda *arguments: pytest.fail("tokenised again"))
    again = tokenise_set(one, load_tokenizer(tokenizer_folder), "vicuna_v1", folder=folder)
    assert (again.uri, again.row(7)) == (stored.uri, truth[7])
    for other in (
        lambda: tokenise_set(one.select([1, 2]), tokenizer, "vicuna_v1", folder=folder),
        lambda: tokenise_set(one, tokenizer, "plain", folder=folder),
    ):
        with pytest.raises(pytest.fail.Exception):
            other()


def test_the_fingerprint_is_over_what_makes_tokens(tokenizer, tokenizer_folder):
    other = load_tokenizer(tokenizer_folder)
    other(["calls leave truncation and padding behind"], truncation=True, max_length=3, padding="max_length")
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    other.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize("vocabulary_size", [1 << 15, (1 << 15) + 1])
def test_tokens_of_large_vocabularies_keep_their_ids(tmp_path, vocabulary_size):
    ids = [IMAGE_PLACE, 0, vocabulary_size - 1]
    table = TokenTable.write(
        str(tmp_path / "t.arrow"), [TokenBatch.of([TokenisedSample(ids, ids)])], vocabulary_size=vocabulary_size
    )
    assert table.row(0).input_ids == ids


def test_an_interrupted_write_leaves_no_table(tokenizer, tmp_path):
    def broken():
        yield TokenBatch.of([TokenisedSample([1, 2], [1, 2])])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenTable.write(str(tmp_path / "t.arrow"), broken())
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_reads_each_part_from_its_own_tokens(tokenizer, tmp_path):
    plans = []
    for number, size in enumerate((3, 0, 4)):
        one = SampleSet.of(str(number), [make_sample(5 * number + i + 1) for i in range(size)], digest=str(number))
        images = {name: IndexedImage(f"k{name}", 56, 56, "") for name in one.image_names}
        tokens = tokenise_set(one, tokenizer, "vicuna_v1", folder=str(tmp_path))
        plans.append(
            plan_table(
                one,
                tokens,
                IndexedImages.of(images),
                budget=visual_token_budget("meteor", {"k": 4}),
                pixels=PIXELS,
                max_length=1000,
            )
        )
    mixture = TablePlan.mixture(plans, [1, 2, 0.5])
    mixture.table.write(str(tmp_path / "samples.parquet"))
    read = SampleTable.read(str(tmp_path / "samples.parquet"))
    assert rows_of(read) == rows_of(mixture.table) == [row for plan in plans for row in rows_of(plan.table)]
    assert read.parts == mixture.table.parts
    assert [(part.num_samples, part.weight) for part in read.parts] == [
        (len(plan.table), w) for plan, w in zip(plans, [1, 2, 0.5], strict=True)
    ]
    assert np.array_equal(read.answer_counts(), [read.num_answer_tokens(i) for i in range(len(read))])
