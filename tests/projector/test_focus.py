"""The vision-guided sampler against a loop over regions, by hand on one map; its share of tokens holds whatever it learns."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from meteor.errors import SettingsError
from meteor.projector import ProjectorOutput, build_projector
from meteor.projector.focus import choose_scales, region_statistics

GRIDS = [(4, 5), (1, 7), (6, 2), (1, 1), (9, 4), (8, 8)]


def project(projector: nn.Module, batch: Any) -> ProjectorOutput:
    return projector(batch.features, batch.cls_attention, batch.grids)


def build(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    projector = build_projector("focus", vision_width=16, llm_width=24, **{"gate_width": 8, **settings}).double()
    with torch.no_grad():
        for parameter in projector.gate.parameters():
            parameter.normal_()
    return projector


def sample(
    projector: nn.Module, features: np.ndarray, region: int, scales: list[int], target: float
) -> list[np.ndarray]:
    """The rows for the MLP of one map (Hu, Wu, C): regions step to finer scales one by one while the tokens last."""
    cells, scores = [], []
    for top in range(0, features.shape[0], region):
        for left in range(0, features.shape[1], region):
            block = features[top : top + region, left : left + region]
            flat = block.reshape(-1, block.shape[-1])
            scores.append(projector.gate(torch.from_numpy(np.concatenate([flat.mean(axis=0), flat.var(axis=0)]))))
            cells.append(
                [
                    [
                        block[r : r + scale, c : c + scale].reshape(-1, block.shape[-1]).mean(axis=0)
                        for r in range(0, block.shape[0], scale)
                        for c in range(0, block.shape[1], scale)
                    ]
                    for scale in scales
                ]
            )
    counts = [[len(one) for one in each] for each in cells]
    chosen = choose_slowly([one.tolist() for one in scores], counts, int(target * features[..., 0].size + 0.5))
    return [row for each, scale in zip(cells, chosen, strict=True) for row in each[scale]]


def choose_slowly(scores: list[list[float]], counts: list[list[int]], budget: int) -> list[int]:
    coarsest = len(counts[0]) - 1
    chosen = [coarsest] * len(counts)
    left = budget - sum(count[coarsest] for count in counts)
    gains = [[0.0] * coarsest for _ in counts]
    for gain, score, count in zip(gains, scores, counts, strict=True):
        for scale in reversed(range(coarsest)):
            own = (score[scale] - score[scale + 1]) / max(count[scale] - count[scale + 1], 1)
            gain[scale] = min(own, gain[scale + 1] if scale + 1 < coarsest else own)

    def take(may_skip: bool, steps: list[tuple[float, int, int]]) -> None:
        nonlocal left
        for _, number, scale in sorted(steps, key=lambda step: (-step[0], step[1], -step[2])):
            cost = counts[number][scale] - counts[number][scale + 1]
            if cost > left:
                if may_skip:
                    continue
                return
            left -= cost
            chosen[number] = scale

    take(False, [(gains[i][s], i, s) for i in range(len(counts)) for s in range(coarsest)])
    take(True, [(gains[i][chosen[i] - 1], i, chosen[i] - 1) for i in range(len(counts)) if chosen[i]])
    return chosen


@pytest.mark.parametrize(
    ("region", "scales", "target"),
    [(4, [1, 2, 4], 0.5), (4, [1, 2, 4], 0.15), (4, [2, 4], 0.15), (3, [1, 3], 0.4), (2, [2], 0.25)],
)
def test_tokens_are_the_means_of_cells_at_each_regions_scale(
    region: int, scales: list[int], target: float, make_sub_images: Callable[..., Any]
) -> None:
    projector = build(region=region, scales=scales, target_keep=target)
    batch = make_sub_images(*GRIDS, dtype=torch.float64)
    output = project(projector, batch)
    for number, (grid, count) in enumerate(zip(GRIDS, batch.num_patches, strict=True)):
        rows = sample(projector, batch.features[number, :count].numpy().reshape(*grid, 16), region, scales, target)
        real = output.mask[number]
        assert real.sum() == len(rows)
        torch.testing.assert_close(output.tokens[number][real], projector.mlp(torch.tensor(np.array(rows))))


def test_a_gate_that_asks_for_variance_keeps_the_busy_region_and_merges_the_flat_one() -> None:
    """A map of 4 x 8: the left half is one colour, the right half noise. The gate, set by hand, prefers scale 1 by variance."""
    projector = build_projector(
        "focus", vision_width=2, llm_width=3, scales=[1, 4], gate_width=1, target_keep=17 / 32
    ).double()
    with torch.no_grad():
        entry, _, exit = projector.gate
        entry.weight.copy_(torch.tensor([[0.0, 0, 1, 1]]))
        entry.bias.zero_()
        exit.weight.copy_(torch.tensor([[1.0], [0.0]]))
        exit.bias.zero_()
    features = torch.randn(4, 8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features[:, :4] = torch.tensor([1.0, -2.0])
    output = projector(features.view(1, 32, 2), torch.ones(1, 32), torch.tensor([[4, 8]]))
    assert output.mask.sum() == 1 + 16
    torch.testing.assert_close(output.tokens[0, 0], projector.mlp(features[0, 0]))
    torch.testing.assert_close(output.tokens[0, 1:17], projector.mlp(features[:, 4:].reshape(16, 2)))


def test_steps_are_taken_by_gain_per_token_until_the_budget_is_spent() -> None:
    """Three regions of 16, 4 or 1 token. Gains per token: region 0 has 1 and 0.5, region 1 has 2 and 3 (counted as 2), region 2
    has -1 and -1. After 3 + 12 + 3 of 24 tokens, region 0's 12 no longer fit, and region 2's 3 do."""
    scores = torch.tensor([[[9.0, 3, 0], [42.0, 6, 0], [-15.0, -3, 0]]])
    counts = torch.tensor([[[16, 4, 1]] * 3])
    choice, price = choose_scales(scores, counts, torch.tensor([3 + 21]))
    assert choice.tolist() == [[1, 0, 1]]
    assert price.tolist() == [0.5]
    assert choose_scales(scores, counts, torch.tensor([1]))[0].tolist() == [[2, 2, 2]]
    finest, free = choose_scales(scores, counts, torch.tensor([48]))
    assert (finest.tolist(), free.tolist()) == ([[0, 0, 0]], [0.0])


@pytest.mark.parametrize(
    ("scales", "target"),
    [([1, 2, 4], 0.15), ([1, 2, 4], 0.2), ([1, 2, 4], 0.3), ([1, 2, 4], 0.5), ([2, 4], 0.15), ([2, 4], 0.2)],
)
@pytest.mark.parametrize("push", [-1.0, 1.0])
def test_the_share_of_tokens_holds_whatever_the_gate_is_pushed_to(
    scales: list[int], target: float, push: float, make_sub_images: Callable[..., Any]
) -> None:
    """The loss pushes to few tokens (-1) or to many; a second training goes the other way from the trained weights."""
    projector = build(scales=scales, target_keep=target)
    optimizer = torch.optim.Adam(projector.parameters(), lr=0.1)
    held_out = make_sub_images((24, 24), (23, 25), (24, 24), dtype=torch.float64)
    batch = make_sub_images((8, 8), (5, 7), dtype=torch.float64)
    pushed: list[torch.Tensor] = []
    projector.gate.register_forward_hook(lambda _, __, score: pushed.append(score))

    def require_share() -> None:
        shares = project(projector, held_out).mask.sum(dim=1) / torch.tensor(held_out.num_patches)
        assert (shares - target).abs().max() <= 0.03
        pushed.clear()

    require_share()
    for direction in (push, -push):
        for _ in range(15):
            optimizer.zero_grad()
            loss = project(projector, batch).tokens.square().mean()
            score = pushed.pop()
            (loss - direction * (score[..., 0] - score[..., -1]).mean()).backward()
            optimizer.step()
        require_share()


def test_the_gates_level_does_not_count(make_sub_images: Callable[..., Any]) -> None:
    projector, batch = build(target_keep=0.3), make_sub_images((12, 12), dtype=torch.float64)
    before = project(projector, batch)
    with torch.no_grad():
        projector.gate[2].bias.add_(7.0)
    torch.testing.assert_close(project(projector, batch).tokens, before.tokens)


def test_the_gate_learns_from_the_tokens_too(make_sub_images: Callable[..., Any]) -> None:
    projector = build()
    project(projector, make_sub_images((8, 8), dtype=torch.float64)).tokens.square().sum().backward()
    assert all(parameter.grad.any() for parameter in projector.gate.parameters())


def test_statistics_are_those_of_real_patches() -> None:
    patches = torch.tensor([[[[1.0], [3.0], [float("nan")], [7.0]]]])
    seen = torch.tensor([[[True, True, False, False]]])
    assert region_statistics(patches, seen).tolist() == [[[2.0, 1.0]]]


def test_its_number_of_parameters() -> None:
    """The MLP's 31,467,520, and the gate's 2 C x 256 + 256 + 256 x 3 + 3 = 525,315 at C = 1024."""
    with torch.device("meta"):
        projector = build_projector("focus", vision_width=1024, llm_width=5120)
    assert sum(parameter.numel() for parameter in projector.parameters()) == 31_467_520 + 525_315 == 31_992_835


@pytest.mark.parametrize("scales", [[], [3], [2, 1], [1, 1], [1, True], 2, "12", [0]])
def test_scales_that_do_not_divide_a_region_are_refused(scales: object) -> None:
    with pytest.raises(SettingsError, match="scales is"):
        build_projector("focus", vision_width=16, llm_width=8, scales=scales)


@pytest.mark.parametrize(("scales", "target"), [([2, 4], 0.5), ([1, 2, 4], 0.05), ([2], 0.3)])
def test_a_share_that_the_scales_cannot_reach_is_refused(scales: list[int], target: float) -> None:
    with pytest.raises(SettingsError, match=f"target_keep is {target}, but scales"):
        build_projector("focus", vision_width=16, llm_width=8, scales=scales, target_keep=target)
