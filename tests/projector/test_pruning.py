"""Projectors that drop or merge patches by class-token attention, against loops over one sub-image at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from meteor.errors import SettingsError
from meteor.projector import ProjectorOutput, build_projector

GRIDS = [(4, 5), (1, 7), (6, 2), (1, 1), (3, 3), (9, 4)]


def project(projector: nn.Module, batch: Any) -> ProjectorOutput:
    return projector(batch.features, batch.cls_attention, batch.grids)


def rows_of(batch: Any, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and attention of a sub-image's real patches."""
    count = batch.num_patches[number]
    return batch.features[number, :count].numpy(), batch.cls_attention[number, :count].numpy()


def check(
    projector: nn.Module, batch: Any, expected: Callable[[np.ndarray, np.ndarray], tuple[list[int], np.ndarray]]
) -> None:
    """``expected`` gives the patches and the rows that go into the MLP."""
    output = project(projector, batch)
    for number in range(len(batch.grids)):
        patches, rows = expected(*rows_of(batch, number))
        real = output.mask[number]
        assert output.indices[number][real].tolist() == patches
        torch.testing.assert_close(output.tokens[number][real], projector.mlp(torch.from_numpy(rows)))


def highest(attention: np.ndarray, count: int) -> list[int]:
    return sorted(sorted(range(len(attention)), key=lambda i: (-attention[i], i))[:count])


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def build(name: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_projector(name, vision_width=16, llm_width=24, **settings).double()


def test_visual_topk_keeps_the_patches_looked_at_most(make_sub_images: Callable[..., Any]) -> None:
    batch = make_sub_images(*GRIDS, dtype=torch.float64)
    batch.cls_attention[0, :20] = 0.25  # ties go to the lower index
    check(build("visual_topk", k=5), batch, lambda rows, attention: (kept := highest(attention, 5), rows[kept]))


def test_visual_topk_is_meteor_without_fusion_and_without_its_native_expert(
    make_sub_images: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_sub_images(*GRIDS, dtype=torch.float64)
    meteor, topk = build("meteor", k=5, visual_weight=1.0, state_size=2), build("visual_topk", k=5)
    topk.mlp.load_state_dict(meteor.head.state_dict())
    monkeypatch.setattr(meteor.fusion, "forward", lambda tokens, ins, *_: (tokens, ins.expand(len(tokens), -1)))
    expected, output = project(meteor, batch), project(topk, batch)
    torch.testing.assert_close(output.tokens, expected.tokens)
    assert torch.equal(output.indices, expected.indices)
    assert torch.equal(output.visual_scores, expected.visual_scores)


@pytest.mark.parametrize(("dominant", "contextual"), [(4, 3), (1, 30), (9, 1), (40, 3)])
def test_visionzip_merges_the_rest_into_even_targets(
    dominant: int, contextual: int, make_sub_images: Callable[..., Any]
) -> None:
    def expected(rows: np.ndarray, attention: np.ndarray) -> tuple[list[int], np.ndarray]:
        kept = highest(attention, dominant)
        rest = [i for i in range(len(rows)) if i not in kept]
        count = min(contextual, len(rest))
        targets = [rest[j * len(rest) // count] for j in range(count)]
        groups = {target: [target] for target in targets}
        for i in rest:
            if i not in targets:
                groups[max(targets, key=lambda target, i=i: cosine(rows[i], rows[target]))].append(i)
        return kept + targets, np.array([rows[i] for i in kept] + [rows[groups[t]].mean(axis=0) for t in targets])

    check(
        build("visionzip", dominant=dominant, contextual=contextual),
        make_sub_images(*GRIDS, dtype=torch.float64),
        expected,
    )


def test_visionzip_keeps_a_target_apart_from_its_duplicate(make_sub_images: Callable[..., Any]) -> None:
    batch = make_sub_images((2, 3), dtype=torch.float64)
    batch.features[0, 1:] = batch.features[0, 0]
    batch.cls_attention[0] = torch.tensor([9.0, 1, 1, 1, 1, 1])
    output = project(build("visionzip", dominant=1, contextual=2), batch)
    assert output.indices.tolist() == [[0, 1, 3]]
    torch.testing.assert_close(output.tokens[0, 1], output.tokens[0, 0])


@pytest.mark.parametrize(("max_tokens", "spaced", "neighbours"), [(6, 3, 2), (3, 3, 50), (20, 1, 1), (2, 9, 3)])
def test_prumerge_keeps_outliers_and_even_ones_and_merges_their_neighbours(
    max_tokens: int, spaced: int, neighbours: int, make_sub_images: Callable[..., Any]
) -> None:
    def expected(rows: np.ndarray, attention: np.ndarray) -> tuple[list[int], np.ndarray]:
        share = attention / attention.sum()
        first, third = np.percentile(share, [25, 75])
        outliers = [i for i in range(len(rows)) if share[i] > third + 1.5 * (third - first)]
        kept = sorted(outliers, key=lambda i: -share[i])[:max_tokens]
        even = min(max_tokens - len(kept), spaced, len(rows))
        kept = sorted({*kept, *(j * len(rows) // even for j in range(even))})
        dropped = [i for i in range(len(rows)) if i not in kept]
        merged = []
        for i in kept:
            near = sorted(dropped, key=lambda j, i=i: -cosine(rows[i], rows[j]))[:neighbours]
            weights = share[[i, *near]]
            merged.append(weights @ rows[[i, *near]] / weights.sum())
        return kept, np.array(merged)

    batch = make_sub_images(*GRIDS, dtype=torch.float64)
    batch.cls_attention[0, 3] *= 40  # outliers; one of them in the last sub-image as well
    batch.cls_attention[0, 17] *= 30
    batch.cls_attention[5, 30] *= 50
    check(build("prumerge_plus", max_tokens=max_tokens, spaced=spaced, neighbours=neighbours), batch, expected)


def test_prumerge_averages_evenly_where_nobody_looks(make_sub_images: Callable[..., Any]) -> None:
    batch = make_sub_images((1, 3), dtype=torch.float64)
    batch.cls_attention[:] = 0
    projector = build("prumerge_plus", max_tokens=1, spaced=1, neighbours=2)
    torch.testing.assert_close(project(projector, batch).tokens[0, 0], projector.mlp(batch.features[0].mean(dim=0)))


@pytest.mark.parametrize("name", ["visual_topk", "visionzip", "prumerge_plus"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_attention_that_no_ranking_can_be_made_of_is_refused(
    name: str, value: float, make_sub_images: Callable[..., Any]
) -> None:
    batch = make_sub_images((2, 3), (3, 3), dtype=torch.float64)
    batch.cls_attention[1, 4] = value
    with pytest.raises(ValueError, match="patch 4 of sub-image 1"):
        project(build(name), batch)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("visual_topk", "k"), ("visionzip", "dominant"), ("visionzip", "contextual")]
    + [("prumerge_plus", one) for one in ("max_tokens", "spaced", "neighbours")],
)
def test_a_setting_that_is_no_count_is_refused(name: str, setting: str) -> None:
    with pytest.raises(SettingsError, match=f"{setting} is 0"):
        build_projector(name, vision_width=16, llm_width=8, **{setting: 0})
