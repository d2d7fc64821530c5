"""Mixed patch grids in one packed pass against transformers' own eager tower, one sub-image at a time."""

import logging

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from meteor.errors import BadImageError
from meteor.vision import encoder as encoder_module
from meteor.vision.encoder import FrozenEncoder
from meteor.vision.memory import bytes_per_token, split_evenly
from meteor.vision.runs import merge_lengths, plan_runs

SIZES = [(56, 56), (28, 84), (84, 28), (56, 56), (14, 14), (42, 70), (28, 84), (70, 42), (126, 14)]
NUM_LAYERS = 4


def make_tower(hidden_act="quick_gelu", **options) -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        hidden_act=hidden_act,
    )
    tower = CLIPVisionModel._from_config(config, **options).eval()
    # As trained towers are: positions and biases that matter.
    for parameter in tower.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return tower


def make_pixels(sizes=SIZES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, height, width, generator=generator) for height, width in sizes]


@torch.no_grad()
def eager_truth(pixels, hidden_act="quick_gelu"):
    eager = make_tower(hidden_act, attn_implementation="eager")
    return [
        eager(one[None], interpolate_pos_encoding=True, output_hidden_states=True, output_attentions=True)
        for one in pixels
    ]


@pytest.mark.parametrize("max_tokens", [None, 1, 30, 10_000])
@pytest.mark.parametrize(
    ("select_layer", "attention_layers"),
    [(-2, (-2,)), (-2, (-1, -2, 1)), (-1, (2,)), (1, (1, 4)), (2, (2, 3)), (3, (1,))],
)
def test_mixed_grids_equal_the_eager_tower_with_all_its_maps(select_layer, attention_layers, max_tokens):
    pixels = make_pixels()
    clip = FrozenEncoder(
        make_tower(), select_layer=select_layer, attention_layers=attention_layers, max_tokens=max_tokens
    )
    for got, one, truth in zip(clip.encode(pixels), pixels, eager_truth(pixels), strict=True):
        assert got.grid == (one.shape[1] // 14, one.shape[2] // 14)
        assert got.finite
        torch.testing.assert_close(got.features, truth.hidden_states[select_layer][0, 1:])
        torch.testing.assert_close(got.cls, truth.hidden_states[select_layer][0, 0])
        for row, layer in zip(got.cls_attention, attention_layers, strict=True):
            block = (layer if layer > 0 else NUM_LAYERS + 1 + layer) - 1
            torch.testing.assert_close(row, truth.attentions[block][0, :, 0, 1:].mean(0))


def test_another_activation_is_the_towers_own():
    pixels = make_pixels(SIZES[:3])
    got = FrozenEncoder(make_tower("gelu")).encode(pixels)
    for one, truth in zip(got, eager_truth(pixels, "gelu"), strict=True):
        torch.testing.assert_close(one.features, truth.hidden_states[-2][0, 1:])


def test_of_the_last_block_only_what_attention_needs_is_run():
    tower = make_tower()
    clip = FrozenEncoder(tower, attention_layers=(-2, -1))
    last = tower.encoder.layers[3]
    called = []
    for name, part in last.named_modules():
        part.register_forward_hook(lambda *given, name=name: called.append(name))
    clip.encode(make_pixels(SIZES[:1]))
    assert sorted(called) == ["layer_norm1", "self_attn.k_proj", "self_attn.q_proj"]


def test_nothing_to_encode_gives_nothing():
    assert FrozenEncoder(make_tower()).encode([]) == []


def test_position_embeddings_are_interpolated_once_for_each_grid(monkeypatch):
    tower = make_tower()
    calls = []
    interpolate = tower.embeddings.interpolate_pos_encoding
    monkeypatch.setattr(
        tower.embeddings, "interpolate_pos_encoding", lambda *given: calls.append(given[1:]) or interpolate(*given)
    )
    clip = FrozenEncoder(tower)
    clip.encode(make_pixels())
    clip.encode(make_pixels())
    assert sorted(calls) == sorted(set(SIZES))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sub_image_that_is_not_finite_is_marked_and_its_neighbours_keep_their_values(value):
    pixels = make_pixels()
    clip = FrozenEncoder(make_tower())
    expected = clip.encode(pixels)
    pixels[3][1, 5, 5] = value
    with pytest.raises(BadImageError, match="for 1 of 9 sub-images") as caught:
        clip.encode(pixels)
    assert caught.value.reason == "non_finite_features"
    got = clip.encode(pixels, raise_bad=False)
    assert [one.finite for one in got] == [i != 3 for i in range(len(SIZES))]
    for i, (one, good) in enumerate(zip(got, expected, strict=True)):
        assert i == 3 or torch.equal(one.features, good.features)


def test_attention_that_is_not_finite_marks_its_sub_image_too():
    tower = make_tower()
    tower.encoder.layers[3].self_attn.k_proj.bias.data.fill_(float("nan"))
    got = FrozenEncoder(tower, attention_layers=(-2, -1)).encode(make_pixels(), raise_bad=False)
    assert not any(one.finite for one in got)
    assert all(one.features.isfinite().all() for one in got)


def test_a_chunk_that_does_not_fit_into_memory_is_halved_and_the_lesson_kept(monkeypatch, caplog):
    pixels = make_pixels()
    clip = FrozenEncoder(make_tower(), max_tokens=1000)
    expected = clip.encode(pixels)
    run_tower, sizes = encoder_module.run_tower, []

    def run_if_small(model, given, runs, **options):
        sizes.append(runs[-1].end)
        if runs[-1].end > 40:
            raise torch.OutOfMemoryError("out of memory")
        return run_tower(model, given, runs, **options)

    monkeypatch.setattr(encoder_module, "run_tower", run_if_small)
    with caplog.at_level(logging.WARNING):
        got = clip.encode(pixels)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.features, other.features)
    total = sum(1 + height * width // 196 for height, width in SIZES)
    assert f"{total} tokens at once do not fit into the memory of cpu; continuing with {total // 2}" in caplog.text
    num_tries = len(sizes)
    clip.encode(pixels)
    assert max(sizes[num_tries:]) <= clip.max_tokens <= 40


def test_a_single_sub_image_that_does_not_fit_is_an_error(monkeypatch):
    def run_never(*given, **options):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(encoder_module, "run_tower", run_never)
    with pytest.raises(torch.OutOfMemoryError):
        FrozenEncoder(make_tower()).encode(make_pixels(SIZES[:1]))


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "expected"),
    [
        ([5, 5, 5, 5], 20, [[0, 1, 2, 3]]),
        ([5, 5, 5, 5], 19, [[0, 1], [2, 3]]),
        ([5, 5, 5, 5], 15, [[0, 1], [2, 3]]),
        ([9, 9, 9], 4, [[0], [1], [2]]),
        ([1, 1, 9], 10, [[0, 1], [2]]),
        ([], 10, []),
    ],
)
def test_batches_are_cut_into_even_chunks(lengths, max_tokens, expected):
    assert split_evenly(range(len(lengths)), lengths, max_tokens) == expected


def test_equal_lengths_share_attention_whatever_their_grids():
    runs = plan_runs([(1, 1), (2, 3), (2, 3), (3, 2), (3, 3)])
    assert [(run.start, run.num, run.length) for run in runs] == [(0, 1, 2), (2, 2, 7), (16, 1, 7), (23, 1, 10)]
    assert [(run.start, run.num, run.length) for run in merge_lengths(runs)] == [(0, 1, 2), (2, 3, 7), (23, 1, 10)]


def test_the_memory_of_a_token_follows_from_the_widths():
    # Two hidden states, a norm, an output of 32; two tensors of 64; the embedding's pixels take more: 588 values of 12 bytes.
    tower = make_tower()
    assert bytes_per_token(tower) == 588 * 12 + 2 * 32 * 4
    tower.config.hidden_size, tower.config.intermediate_size = 1024, 4096
    assert bytes_per_token(tower.to(torch.bfloat16)) == 2 * (4 * 1024 + 2 * 4096)
