"""What holds for every projector: mixed maps, padding, gradients, empty batches, budgets, low precision, one graph."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meteor.image.budget import visual_token_budget
from meteor.projector import Projector, ProjectorOutput, build_projector
from meteor.projector.registry import PROJECTORS

GRIDS = [(4, 5), (1, 7), (6, 2), (1, 1), (3, 3), (9, 4)]
METEOR = {"k": 5, "state_size": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "avg_pool": {"grid": 3},
    "ldpv2": {"grid": 3},
    "resampler": {"k": 6},
    "c_abstractor": {"grid": 3},
    "visual_topk": {"k": 5},
    "visionzip": {"dominant": 4, "contextual": 3},
    "prumerge_plus": {"max_tokens": 6, "spaced": 3, "neighbours": 2},
    "llava_mini": {"grid": 2},
    "focus": {"region": 4, "scales": [1, 2], "gate_width": 8},
    "meteor": METEOR,
    "meteor_37m": METEOR,
}
# Parameters whose gradient is exactly zero in theory: a key's bias adds the same to all logits of a query; and what
# only chooses tokens learns nothing from them.
IDLE = {"attention.key.bias", "positions"}
# Those whose tokens hang on no comparison that rounding could turn; the class token's attention is always float32.
NOT_CHOOSING = {
    *(
        "mlp",
        "avg_pool",
        "pixel_shuffle",
        "ldpv2",
        "c_abstractor",
        "llava_mini",
        "visual_topk",
        "resampler",
        "tokenpacker",
    )
}
every = pytest.mark.parametrize("name", PROJECTORS)


def make_projector(name: str) -> Projector:
    """Every weight random, so that each one counts."""
    torch.manual_seed(0)
    projector = build_projector(name, vision_width=16, llm_width=24, **SETTINGS.get(name, {}))
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return projector


def project(projector: Projector, batch: Any) -> ProjectorOutput:
    return projector(batch.features, batch.cls_attention, batch.grids)


@every
def test_a_mixed_batch_equals_each_sub_image_alone(name: str, make_sub_images: Callable[..., Any]) -> None:
    projector, batch = make_projector(name).double(), make_sub_images(*GRIDS, dtype=torch.float64)
    together = project(projector, batch)
    for number in range(len(GRIDS)):
        alone = project(projector, batch.alone(number))
        real = alone.mask[0]
        assert real[: real.sum()].all()
        assert together.mask[number].sum() == real.sum()
        torch.testing.assert_close(together.tokens[number][together.mask[number]], alone.tokens[0][real])
        for field in ("indices", "visual_scores", "native_scores"):
            mine, theirs = getattr(together, field), getattr(alone, field)
            if mine is not None:
                count = theirs.shape[1]
                torch.testing.assert_close(mine[number, :count], theirs[0])


@every
def test_what_stands_at_padding_changes_neither_results_nor_gradients(
    name: str, make_sub_images: Callable[..., Any]
) -> None:
    projector, batch = make_projector(name), make_sub_images((2, 2), (3, 4), (1, 1), max_patches=15)
    results = []
    for value in (0.0, math.nan, math.inf):
        projector.zero_grad()
        output = project(projector, batch.with_padding(value))
        (output.tokens.square().sum() + (0 if output.aux_loss is None else output.aux_loss)).backward()
        results.append([output.tokens, *(one.grad for one in projector.parameters() if one.requires_grad)])
    for one in results[1:]:
        for mine, theirs in zip(results[0], one, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert not output.tokens[~output.mask].any()


@every
def test_every_parameter_gets_a_gradient(name: str, make_sub_images: Callable[..., Any]) -> None:
    projector = make_projector(name)
    output = project(projector, make_sub_images(*GRIDS))
    output.tokens.square().sum().backward()
    idle = {
        one for one, parameter in projector.named_parameters() if parameter.grad is None or not parameter.grad.any()
    }
    assert idle <= (IDLE if name != "c_abstractor" else set())


@every
@pytest.mark.parametrize("max_patches", [0, 6])
def test_an_empty_batch_gives_every_parameter_a_zero_gradient(name: str, max_patches: int) -> None:
    projector = make_projector(name)
    output = projector(
        torch.zeros(0, max_patches, 16), torch.zeros(0, max_patches), torch.zeros(0, 2, dtype=torch.long)
    )
    assert output.tokens.shape[::2] == (0, 24)
    assert output.mask.shape == output.tokens.shape[:2]
    (output.tokens.sum() + (0 if output.aux_loss is None else output.aux_loss)).backward()
    assert all((one.grad == 0).all() for one in projector.parameters() if one.requires_grad)


@every
@settings(max_examples=15, deadline=None)
@given(grids=st.lists(st.tuples(st.integers(1, 11), st.integers(1, 11)), min_size=1, max_size=4))
def test_the_budget_is_the_number_of_tokens_or_for_adaptive_ones_above_it(
    name: str, grids: list[tuple[int, int]]
) -> None:
    projector = build_projector(name, vision_width=4, llm_width=4, **SETTINGS.get(name, {}))
    budget = visual_token_budget(name, SETTINGS.get(name, {}))(grids)
    if name == "global_view":  # slices are never given to it
        grids, budget = grids[:1], budget[:1]
    num_patches = max(rows * columns for rows, columns in grids)
    generator = torch.Generator().manual_seed(len(grids))
    with torch.inference_mode():
        output = projector(
            torch.randn(len(grids), num_patches, 4, generator=generator),
            torch.rand(len(grids), num_patches, generator=generator),
            torch.tensor(grids),
        )
    counts = output.mask.sum(dim=1).tolist()
    assert output.tokens.shape[1] >= max(budget)
    if name in ("focus", "prumerge_plus"):
        assert all(0 < count <= most for count, most in zip(counts, budget, strict=True))
    else:
        assert counts == budget


@every
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("features", [torch.bfloat16, torch.float32])
def test_low_precision_gives_finite_tokens_and_gradients(
    name: str, weights: torch.dtype, features: torch.dtype, make_sub_images: Callable[..., Any]
) -> None:
    projector, batch = make_projector(name), make_sub_images(*GRIDS, dtype=features)
    expected = project(projector, batch)
    output = project(low := copy.deepcopy(projector).to(weights), batch)
    output.tokens.float().square().sum().backward()
    assert output.tokens.dtype == weights
    assert all(one.grad.isfinite().all() for one in low.parameters() if one.requires_grad)
    # What is chosen may differ by rounding; what is not chosen may not.
    if name in NOT_CHOOSING:
        torch.testing.assert_close(output.tokens.float(), expected.tokens, rtol=0.1, atol=0.25)


@every
def test_autocast_gives_finite_tokens(name: str, make_sub_images: Callable[..., Any]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert project(make_projector(name), make_sub_images(*GRIDS)).tokens.isfinite().all()


@every
def test_it_is_one_graph_with_the_same_numbers(name: str, make_sub_images: Callable[..., Any]) -> None:
    projector, batch = make_projector(name), make_sub_images(*GRIDS)
    torch._dynamo.reset()
    compiled = torch.compile(projector, backend="eager", fullgraph=True)
    got, expected = project(compiled, batch), project(projector, batch)
    assert got.mask.sum(dim=1).tolist() == expected.mask.sum(dim=1).tolist()
    torch.testing.assert_close(got.tokens[got.mask], expected.tokens[expected.mask])


@every
def test_nothing_but_the_tokens_own_sub_image_decides_about_them(
    name: str, make_sub_images: Callable[..., Any]
) -> None:
    projector, batch = make_projector(name), make_sub_images((3, 4), (2, 5))
    before = project(projector, batch).tokens[0]
    batch.features[1] += 1
    assert torch.equal(project(projector, batch).tokens[0], before)
