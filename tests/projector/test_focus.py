"""The vision-guided sampler against a loop over regions, by hand on one map, and that its gate learns."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from meteor.errors import SettingsError
from meteor.projector import ProjectorOutput, build_projector
from meteor.projector.focus import region_statistics

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
    projector: nn.Module, features: np.ndarray, region: int, scales: list[int]
) -> tuple[list[np.ndarray], float]:
    """The rows for the MLP of one map (Hu, Wu, C), and the share of tokens expected under the gate."""
    rows, expected = [], 0.0
    for top in range(0, features.shape[0], region):
        for left in range(0, features.shape[1], region):
            block = features[top : top + region, left : left + region]
            flat = block.reshape(-1, block.shape[-1])
            statistics = np.concatenate([flat.mean(axis=0), flat.var(axis=0)])
            probability = projector.gate(torch.from_numpy(statistics)).softmax(dim=-1).tolist()
            cells = []
            for scale in scales:
                pieces = [
                    block[r : r + scale, c : c + scale].reshape(-1, block.shape[-1])
                    for r in range(0, block.shape[0], scale)
                    for c in range(0, block.shape[1], scale)
                ]
                cells.append([piece.mean(axis=0) for piece in pieces])
            rows += cells[int(np.argmax(probability))]
            expected += sum(p * len(one) for p, one in zip(probability, cells, strict=True))
    return rows, expected / (features.shape[0] * features.shape[1])


@pytest.mark.parametrize(("region", "scales"), [(4, [1, 2, 4]), (4, [2, 4]), (3, [1, 3]), (2, [2]), (6, [2, 3, 6])])
def test_tokens_are_the_means_of_cells_at_each_regions_scale(
    region: int, scales: list[int], make_sub_images: Callable[..., Any]
) -> None:
    projector, batch = build(region=region, scales=scales), make_sub_images(*GRIDS, dtype=torch.float64)
    output = project(projector, batch)
    terms = []
    for number, (grid, count) in enumerate(zip(GRIDS, batch.num_patches, strict=True)):
        rows, _ = sample(projector, batch.features[number, :count].numpy().reshape(*grid, 16), region, scales)
        real = output.mask[number]
        assert real.sum() == len(rows)
        torch.testing.assert_close(output.tokens[number][real], projector.mlp(torch.tensor(np.array(rows))))
        terms.append((len(rows) / count - 0.5) ** 2)
    torch.testing.assert_close(output.aux_loss.item(), float(np.mean(terms)))


def test_a_gate_that_asks_for_variance_keeps_the_busy_region_and_merges_the_flat_one() -> None:
    """A map of 4 x 8: the left half is one colour, the right half noise. The gate is set by hand: scale 4 if nothing varies."""
    projector = build_projector("focus", vision_width=2, llm_width=3, scales=[1, 4], gate_width=1).double()
    with torch.no_grad():
        entry, _, exit = projector.gate
        entry.weight.copy_(torch.tensor([[0.0, 0, 1, 1]]))
        entry.bias.zero_()
        exit.weight.copy_(torch.tensor([[1.0], [0.0]]))
        exit.bias.copy_(torch.tensor([-0.1, 0.0]))
    features = torch.randn(4, 8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features[:, :4] = torch.tensor([1.0, -2.0])
    output = projector(features.view(1, 32, 2), torch.ones(1, 32), torch.tensor([[4, 8]]))
    assert output.mask.sum() == 1 + 16
    torch.testing.assert_close(output.tokens[0, 0], projector.mlp(features[0, 0]))
    torch.testing.assert_close(output.tokens[0, 1:17], projector.mlp(features[:, 4:].reshape(16, 2)))
    assert output.aux_loss.item() == pytest.approx((17 / 32 - 0.5) ** 2)


def test_the_load_terms_gradient_is_that_of_the_expected_share(make_sub_images: Callable[..., Any]) -> None:
    projector, batch = build(target_keep=0.3), make_sub_images((8, 8), (5, 3), dtype=torch.float64)
    output = project(projector, batch)
    [weight_grad] = torch.autograd.grad(output.aux_loss, projector.gate[2].bias)
    shares = output.mask.sum(dim=1) / torch.tensor(batch.num_patches)

    def expected_share(bias: torch.Tensor, number: int, grid: tuple[int, int]) -> float:
        with torch.no_grad():
            projector.gate[2].bias.copy_(bias)
        count = batch.num_patches[number]
        return sample(projector, batch.features[number, :count].numpy().reshape(*grid, 16), 4, [1, 2, 4])[1]

    bias, step = projector.gate[2].bias.detach().clone(), 1e-6
    for i in range(3):
        slope = 0.0
        for number, grid in enumerate([(8, 8), (5, 3)]):
            moved = bias.clone()
            moved[i] += step
            difference = expected_share(moved, number, grid) - expected_share(bias, number, grid)
            slope += 2 * (float(shares[number]) - 0.3) * difference / step / 2
        assert weight_grad[i].item() == pytest.approx(slope, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("target", [0.1, 0.9])
def test_the_load_term_alone_brings_the_share_of_tokens_to_its_target(
    target: float, make_sub_images: Callable[..., Any]
) -> None:
    projector, batch = build(target_keep=target), make_sub_images(*[(8, 8)] * 8, dtype=torch.float64)
    optimizer = torch.optim.Adam(projector.gate.parameters(), lr=0.02)
    before = project(projector, batch).aux_loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        project(projector, batch).aux_loss.backward()
        optimizer.step()
    output = project(projector, batch)
    assert output.aux_loss.item() < before / 10
    assert output.mask.sum().item() / (8 * 64) == pytest.approx(target, abs=0.12)


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
