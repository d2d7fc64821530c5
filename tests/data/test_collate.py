from dataclasses import replace

import pytest
import torch

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.data.collate import Batch, ImageLayout, collate, expand_images, num_image_tokens
from meteor.image.budget import visual_token_budget
from meteor.text.tokenizer import VisualTokens
from meteor.text.tokens import TokenisedSample

# The place of an image in a sample, and a visual slot in a batch.
V, S, X = IMAGE_PLACE, 99, IGNORE_INDEX
COMMA, NEWLINE = 3, 4
SEPARATORS = VisualTokens(image_id=S, slice_id=COMMA, row_id=NEWLINE)


def at_most(k):
    return lambda grids: [min(k, rows * columns) for rows, columns in grids]


def make_layout(columns=None, rows=None):
    """A global view of 6 patches; slices of 4."""
    if columns is None:
        return ImageLayout(None, ((2, 3),))
    return ImageLayout((columns, rows), ((2, 3), *[(2, 2)] * (columns * rows)))


def make_sample(*ids, answer=2):
    """The last ``answer`` tokens are labels."""
    labels = [X] * (len(ids) - answer) + list(ids[len(ids) - answer :])
    return TokenisedSample(list(ids), labels)


def collated(samples, k=5, **options):
    settings = {"budget": at_most(k), "visual_tokens": SEPARATORS, "pad_id": 0, "vision_width": 16, "select_layer": -2}
    return collate([[sample] for sample in samples], **{**settings, **options})


def test_global_view_first_then_slices_row_by_row_with_a_separator_after_each():
    longer, num_slots = expand_images(make_sample(1, V, 8, 9), [make_layout(2, 2)], at_most(3), SEPARATORS)
    visual = [S, S, S, S, S, S, COMMA, S, S, S, NEWLINE, S, S, S, COMMA, S, S, S, NEWLINE]
    assert longer.input_ids == [1, *visual, 8, 9]
    assert longer.labels == [X, *[X] * len(visual), 8, 9]
    assert num_slots == [3, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("columns", "rows", "separators"),
    [
        (3, 2, [COMMA, COMMA, NEWLINE, COMMA, COMMA, NEWLINE]),
        (1, 3, [NEWLINE, NEWLINE, NEWLINE]),
        (4, 1, [COMMA, COMMA, COMMA, NEWLINE]),
    ],
)
def test_there_are_as_many_separators_as_slices_and_a_newline_ends_each_row(columns, rows, separators):
    longer, _ = expand_images(make_sample(V, 9, answer=1), [make_layout(columns, rows)], at_most(4), SEPARATORS)
    assert [token for token in longer.input_ids if token != S] == [*separators, 9]
    # The separator follows its slice: nothing but the global view's 4 and the first slice's 4 slots before it.
    assert longer.input_ids.index(separators[0]) == 8


def test_slots_carry_their_images_number_and_their_turns_and_separators_neither():
    sample = TokenisedSample([1, V, NEWLINE, V, 7, 8, 9], [X] * 5 + [8, 9], [0, 1, 0, 1, 1, 0, 0])
    longer, _ = expand_images(sample, [make_layout(2, 1), make_layout()], at_most(1), SEPARATORS)
    assert longer.input_ids == [1, S, S, COMMA, S, NEWLINE, NEWLINE, S, 7, 8, 9]
    assert longer.turns == [0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0]
    assert longer.image_numbers == [0, 1, 1, 0, 1, 0, 0, 2, 0, 0, 0]


def test_sub_images_without_tokens_are_not_in_the_batch(make_features):
    """What `global_view` gives is the batch of the global views."""
    samples = [(make_sample(1, V, 9, answer=1), [make_features("a", sliced=True)])]
    options = {"visual_tokens": SEPARATORS, "pad_id": 0, "vision_width": 16, "select_layer": -2}
    alone = collate([samples], budget=visual_token_budget("mlp", {}), sub_images="global", **options)
    zeros = collate([samples], budget=visual_token_budget("global_view", {}), **options)
    for name, tensor in alone.as_inputs().items():
        assert torch.equal(getattr(zeros, name), tensor), name
    assert zeros.grids.tolist() == [[2, 3]]


def test_an_unsliced_image_has_no_separator():
    longer, num_slots = expand_images(make_sample(1, V, 9, answer=1), [make_layout()], at_most(144), SEPARATORS)
    assert longer.input_ids == [1, *[S] * 6, 9]
    assert num_slots == [6]


def test_images_of_one_sample_take_their_places_in_order():
    sample = make_sample(1, V, NEWLINE, V, 7, V, 9, answer=1)
    layouts = [make_layout(), make_layout(2, 1), make_layout()]
    longer, num_slots = expand_images(sample, layouts, at_most(2), SEPARATORS)
    second = [S, S, S, S, COMMA, S, S, NEWLINE]
    assert longer.input_ids == [1, S, S, NEWLINE, *second, 7, S, S, 9]
    assert num_slots == [2, 2, 2, 2, 2]


def test_a_slice_without_tokens_has_no_separator_either():
    longer, num_slots = expand_images(
        make_sample(V, 9, answer=1), [make_layout(3, 1)], lambda grids: [2, 1, 0, 1], SEPARATORS
    )
    assert longer.input_ids == [S, S, S, COMMA, S, NEWLINE, 9]
    assert num_slots == [2, 1, 0, 1]


@pytest.mark.parametrize("num_layouts", [0, 1, 3])
def test_placeholders_and_images_must_be_equally_many(num_layouts):
    with pytest.raises(AssertionError, match="one placeholder per image"):
        expand_images(make_sample(V, V, 9), [make_layout()] * num_layouts, at_most(2), SEPARATORS)


@pytest.mark.parametrize("k", [1, 4, 144])
@pytest.mark.parametrize("grid", [(), (2, 1), (2, 3)])
def test_the_length_of_an_image_is_known_without_expanding_it(grid, k):
    layout = make_layout(*grid)
    longer, _ = expand_images(make_sample(V, 9, answer=1), [layout], at_most(k), SEPARATORS)
    assert num_image_tokens(layout, at_most(k)) == len(longer.input_ids) - 1


def test_a_batch_holds_each_sub_image_and_each_sample_as_given(make_features):
    sliced, plain = make_features("a", sliced=True, seed=1), make_features("b", seed=2)
    samples = [(make_sample(1, V, 8, 9), [sliced]), (make_sample(1, V, 7, 8, 9), [plain])]
    batch = collated(samples, k=5)
    assert batch.num_samples == 2
    assert batch.grids.tolist() == [[2, 3], [3, 2], [3, 2], [2, 4]]
    assert batch.num_slots.tolist() == [5, 5, 5, 5]
    assert batch.features.shape == (4, 8, 16)
    features, attention = [*sliced.features, *plain.features], [*sliced.cls_attention, *plain.cls_attention]
    for i, num_patches in enumerate([6, 6, 6, 8]):
        assert torch.equal(batch.features[i, :num_patches], features[i])
        assert not batch.features[i, num_patches:].any()
        assert torch.equal(batch.cls_attention[i, :num_patches], attention[i][0])
        assert not batch.cls_attention[i, num_patches:].any()
    first = [1, *[S] * 10, COMMA, *[S] * 5, NEWLINE, 8, 9]
    second = [1, *[S] * 5, 7, 8, 9]
    padding = len(first) - len(second)
    assert batch.input_ids.tolist() == [first, second + [0] * padding]
    assert batch.attention_mask.tolist() == [[1] * 20, [1] * 9 + [0] * padding]
    assert batch.labels[1].tolist() == [X] * 7 + [8, 9] + [X] * padding
    assert (batch.num_visual_tokens, batch.num_text_tokens) == (20, 20 + 9 - 20)
    assert batch.num_squares == 20**2 + 9**2


def test_squared_lengths_are_those_of_samples_not_of_rows_or_padding():
    mask = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 3]])
    batch = Batch(*[mask] * 5, *[torch.zeros(1)] * 4, num_samples=5)
    assert batch.num_squares == 3**2 + 2**2 + 1 + 4**2 + 1


def test_padding_on_the_left_moves_whole_rows(make_features):
    samples = [(make_sample(1, 5, 6, 7, 8, 9), []), (make_sample(1, V, 9, answer=1), [make_features("a")])]
    batch = collated(samples, k=1, padding_side="left")
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 8, 9], [0, 0, 0, 1, S, 9]]
    assert batch.attention_mask[1].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.labels[1].tolist() == [X, X, X, X, X, 9]


def test_the_attention_row_is_the_selected_layers(make_features):
    image = make_features("a")
    rows = torch.stack([torch.full((8,), 0.1), torch.full((8,), 0.2)])
    image = replace(image, attention_layers=(-1, -2), cls_attention=[rows])
    batch = collated([(make_sample(V, 9, answer=1), [image])])
    assert torch.equal(batch.cls_attention, rows[1:])


def test_the_global_view_alone_drops_slices_and_separators(make_features):
    image = make_features("a", sliced=True)
    batch = collated([(make_sample(1, V, 9, answer=1), [image])], sub_images="global")
    assert batch.input_ids.tolist() == [[1, *[S] * 5, 9]]
    assert batch.grids.tolist() == [[2, 3]]
    assert torch.equal(batch.features[0], image.features[0])


def test_a_batch_without_images_gets_a_blank_sub_image_without_slots():
    batch = collated([(make_sample(1, 8, 9), [])])
    assert batch.num_slots.tolist() == [0]
    assert batch.features.shape == (1, 1, 16)
    assert batch.grids.tolist() == [[1, 1]]
    assert (batch.num_samples, batch.num_visual_tokens, batch.num_text_tokens) == (1, 0, 3)


def test_a_batch_without_samples_weighs_nothing():
    batch = collated([])
    assert (batch.num_samples, batch.num_slots.tolist(), batch.labels.tolist()) == (0, [0], [[X]])


def test_features_keep_the_caches_type_and_attention_is_float32(make_features):
    image = make_features("a")
    image = replace(image, features=[image.features[0].half()])
    batch = collated([(make_sample(1, V, 9, answer=1), [image])])
    assert (batch.features.dtype, batch.cls_attention.dtype) == (torch.float16, torch.float32)


def test_moving_a_batch_moves_every_tensor_and_keeps_the_count(make_features):
    batch = collated([(make_sample(1, V, 9, answer=1), [make_features("a")])] * 2)
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in moved.as_inputs().values()} == {"meta"}
    assert (moved.num_samples, len(moved.as_inputs())) == (2, 9)
