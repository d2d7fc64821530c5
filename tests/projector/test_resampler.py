"""LLaVA-UHD's resampler against loops over queries and their windows, and its properties in a batch."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from meteor.errors import SettingsError
from meteor.projector import Projector, ProjectorOutput, build_projector

Array = np.ndarray
GRIDS = [(4, 5), (1, 7), (6, 2), (1, 1), (3, 3), (9, 4)]


def make_projector(k: int = 6, *, llm_width: int = 24) -> Projector:
    """Every weight random, so that each one counts."""
    torch.manual_seed(0)
    projector = build_projector("resampler", vision_width=16, llm_width=llm_width, k=k)
    with torch.no_grad():
        for parameter in projector.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return projector


def project(projector: Projector, batch: Any) -> ProjectorOutput:
    return projector(batch.features, batch.cls_attention, batch.grids)


def norm(row: Array, weights: dict[str, Array], name: str) -> Array:
    centred = row - row.mean()
    return centred / np.sqrt(centred.var() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def position(place: tuple[int, int], width: int) -> Array:
    num_waves = width // 4
    channels: list[float] = []
    for coordinate in place:
        angles = [coordinate / 10_000 ** (wave / num_waves) for wave in range(num_waves)]
        channels += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return np.array(channels)


def resample(
    weights: dict[str, Array], features: Array, grid: tuple[int, int], query_grid: tuple[int, int], heads: int
) -> Array:
    """One sub-image, one query, one patch, one head at a time."""

    def linear(name: str, row: Array) -> Array:
        return weights[f"attention.{name}.weight"] @ row + weights[f"attention.{name}.bias"]

    width = weights["projection"].shape[0]
    tokens = []
    for number, learned in enumerate(weights["queries"]):
        r, c = divmod(number, query_grid[1])
        query = linear("query", norm(learned, weights, "query_norm") + position((r, c), width))
        keys, values = [], []
        for y in range(math.floor(r * grid[0] / query_grid[0]), math.ceil((r + 1) * grid[0] / query_grid[0])):
            for x in range(math.floor(c * grid[1] / query_grid[1]), math.ceil((c + 1) * grid[1] / query_grid[1])):
                content = norm(weights["to_keys.weight"] @ features[y * grid[1] + x], weights, "key_norm")
                keys.append(linear("key", content + position((y, x), width)))
                values.append(linear("value", content))
        attended = np.zeros(width)
        for channels in np.split(np.arange(width), heads):
            logits = np.array([query[channels] @ key[channels] for key in keys]) / math.sqrt(len(channels))
            shares = np.exp(logits - logits.max())
            attended[channels] = sum(
                share * value[channels] for share, value in zip(shares / shares.sum(), values, strict=True)
            )
        tokens.append(norm(linear("output", attended), weights, "output_norm") @ weights["projection"])
    return np.array(tokens)


@pytest.mark.parametrize(
    ("k", "query_grid", "llm_width", "heads"), [(6, (2, 3), 24, 1), (9, (3, 3), 256, 2), (32, (4, 8), 24, 1)]
)
def test_tokens_are_those_of_loops_over_queries_and_their_windows(
    k: int, query_grid: tuple[int, int], llm_width: int, heads: int, make_sub_images: Callable[..., Any]
) -> None:
    projector = make_projector(k, llm_width=llm_width).double()
    batch = make_sub_images(*GRIDS, dtype=torch.float64)
    output = project(projector, batch.with_padding(math.nan))
    weights = {name: value.numpy() for name, value in projector.state_dict().items()}
    assert output.mask.all()
    assert output.indices is output.visual_scores is output.native_scores is output.aux_loss is None
    for number, (grid, count) in enumerate(zip(GRIDS, batch.num_patches, strict=True)):
        expected = resample(weights, batch.features[number, :count].numpy(), grid, query_grid, heads)
        # Positions are computed in float32.
        torch.testing.assert_close(output.tokens[number].detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_all_but_the_position_table_learns_whatever_a_stage_unfreezes(make_sub_images: Callable[..., Any]) -> None:
    projector = make_projector().requires_grad_(False).requires_grad_(True)
    assert not projector.positions.requires_grad
    # As transformers' from_pretrained leaves it.
    projector.positions.requires_grad = True
    project(projector, make_sub_images(*GRIDS)).tokens.square().sum().backward()
    # Exactly zero in theory: the key's bias adds the same to all logits of a query.
    idle = {name for name, p in projector.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle - {"attention.key.bias"} == {"positions"}


@pytest.mark.parametrize(
    ("k", "num_parameters"),
    [
        # D = 5120: queries and their table 2 k D; keys 1024 D; attention 4 D^2 + 4 D; three LayerNorms 6 D;
        # projection D^2: with k = 144, 5 D^2 + 1322 D = 131,072,000 + 6,768,640.
        (144, 137_840_640),
        (64, 137_840_640 - 2 * 80 * 5120),
        (32, 137_840_640 - 2 * 112 * 5120),
    ],
)
def test_it_has_llava_uhds_number_of_parameters_frozen_table_included(k: int, num_parameters: int) -> None:
    with torch.device("meta"):
        projector = build_projector("resampler", vision_width=1024, llm_width=5120, k=k)
    assert sum(parameter.numel() for parameter in projector.parameters()) == num_parameters
    assert projector.attention.num_heads == 40


@pytest.mark.parametrize(
    ("settings", "message"), [({"k": 0}, "k is 0"), ({"k": 2.0}, "k is 2.0"), ({"llm_width": 10}, "not 10")]
)
def test_what_cannot_be_built_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build_projector("resampler", **{"vision_width": 16, "llm_width": 8} | settings)
