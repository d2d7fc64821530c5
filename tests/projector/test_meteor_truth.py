"""The whole Meteor projector against a second implementation: numpy, float64, one sub-image, loops."""

from collections.abc import Callable
from math import erf
from typing import Any

import numpy as np
import pytest
import torch

from meteor.projector import build_projector

Array = np.ndarray


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def norm(row: Array, weights: dict[str, Array]) -> Array:
    centred = row - row.mean()
    scale = weights.get("fusion.norm.weight", 1.0)
    return centred / np.sqrt(centred.var() + 1e-5) * scale + weights.get("fusion.norm.bias", 0.0)


def summarise(tokens: Array, grid: tuple[int, int], window: int, kernel: Array | None) -> Array:
    """Mean (or depth-wise convolution) over the window of each token of the map."""
    rows, columns = grid
    half = window // 2
    result = np.zeros_like(tokens)
    for patch in range(rows * columns):
        row, column = divmod(patch, columns)
        total, count = np.zeros(tokens.shape[1]), 0
        for r in range(max(0, row - half), min(rows, row + half + 1)):
            for c in range(max(0, column - half), min(columns, column + half + 1)):
                weight = 1.0 if kernel is None else kernel[:, r - row + half, c - column + half]
                total = total + weight * tokens[r * columns + c]
                count += 1
        result[patch] = total / (count if kernel is None else 1)
    return result


def visit(num_patches: int, mode: str, direction: int) -> list[tuple[str, int]]:
    patches = list(range(num_patches))
    centre = num_patches // 2
    order: list[tuple[str, int]] = []
    for patch in patches if direction == 0 else patches[::-1]:
        if direction == 0 and patch == centre:
            order.append(("INS", 0))
        order += [("TL", patch), ("T", patch)] if mode == "local_to_single" else [("T", patch)]
        if direction == 1 and patch == centre:
            order.append(("INS", 0))
    return order


def scan(sequence: Array, weights: dict[str, Array], direction: int) -> Array:
    """Causal depth-wise convolution, SiLU, and Mamba's recurrence, for one direction."""
    width = sequence.shape[1]
    own = slice(direction * width, (direction + 1) * width)
    ssm = {key.removeprefix("fusion.ssm.scan."): value for key, value in weights.items()}
    taps = ssm["conv.weight"][own, 0]
    x_proj, dt_proj = ssm["x_proj"][direction], ssm["dt_proj"][direction]
    A = -np.exp(ssm["A_log"][own])
    rank, num_states = dt_proj.shape[1], A.shape[1]
    state = np.zeros((width, num_states))
    outputs = []
    for step in range(len(sequence)):
        u = ssm["conv.bias"][own].copy()
        for back in range(min(taps.shape[1], step + 1)):
            u += taps[:, -1 - back] * sequence[step - back]
        u = silu(u)
        projected = x_proj @ u
        dt, B, C = projected[:rank], projected[rank : rank + num_states], projected[rank + num_states :]
        delta = np.log1p(np.exp(dt_proj @ dt + ssm["dt_bias"][own]))
        state = np.exp(delta[:, None] * A) * state + (delta * u)[:, None] * B[None, :]
        outputs.append(state @ C + ssm["D"][own] * u)
    return np.array(outputs)


def fuse(
    tokens: Array, ins: Array, grid: tuple[int, int], weights: dict[str, Array], settings: dict[str, Any]
) -> Array:
    """Fused tokens, then INS."""
    num_patches = len(tokens)
    rows = np.vstack([tokens, ins])
    in_proj, out_proj = weights["fusion.ssm.in_proj.weight"], weights["fusion.ssm.out_proj.weight"]
    projected = np.array([in_proj @ norm(row, weights) for row in rows])
    x, z = np.split(projected, 2, axis=1)
    separate = settings["name"] == "meteor_37m"
    result = rows.copy()
    modes = ["single", "local_to_single"] if settings["scan"] == "both" else [settings["scan"]]
    for mode in modes:
        by_direction = []
        for direction in (0, 1):
            own = np.split(x, 2, axis=1)[direction] if separate else x
            kernel = weights.get("fusion.ssm.scan.local.weight")
            if kernel is not None and separate:
                kernel = np.split(kernel, 2)[direction]
            local = summarise(own[:num_patches], grid, settings["window"], kernel)
            order = visit(num_patches, mode, direction)
            source = {"TL": local, "T": own[:num_patches], "INS": own[num_patches:]}
            y = scan(np.array([source[kind][patch] for kind, patch in order]), weights, direction)
            places = [order.index(("T", patch)) for patch in range(num_patches)] + [order.index(("INS", 0))]
            by_direction.append(y[places])
        if separate:
            for y, gate, out in zip(by_direction, np.split(z, 2, axis=1), np.split(out_proj, 2, axis=1), strict=True):
                result += (y * silu(gate)) @ out.T / 2
        else:
            result += ((by_direction[0] + by_direction[1]) / 2 * silu(z)) @ out_proj.T
    return result


def select(fused: Array, ins: Array, attention: Array, k: int, visual_weight: float) -> list[int]:
    visual = attention / attention.sum()
    logits = fused @ ins
    native = np.exp(logits - logits.max())
    native /= native.sum()
    score = visual_weight * visual + (1 - visual_weight) * native
    return sorted(sorted(range(len(fused)), key=lambda patch: (-score[patch], patch))[:k])


def project(
    features: Array, attention: Array, grid: tuple[int, int], weights: dict[str, Array], settings: dict[str, Any]
) -> tuple[Array, list[int]]:
    tokens, ins = features, weights["instruction"]
    if settings["name"] == "meteor_37m":
        tokens, ins = (rows @ weights["entry.weight"].T + weights["entry.bias"] for rows in (tokens, ins))
    fused = fuse(tokens, ins, grid, weights, settings)
    kept = select(fused[:-1], fused[-1], attention, settings["k"], settings["visual_weight"])
    out = fused[kept]
    if settings["name"] == "meteor":
        hidden = out @ weights["head.0.weight"].T + weights["head.0.bias"]
        hidden = hidden * (1 + np.vectorize(erf)(hidden / np.sqrt(2))) / 2
        out = hidden @ weights["head.2.weight"].T + weights["head.2.bias"]
    return out, kept


@pytest.mark.parametrize("name", ["meteor", "meteor_37m"])
@pytest.mark.parametrize("grid", [(4, 5), (3, 3), (1, 7), (1, 1)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"scan": "single"}, {"scan": "both", "window": 7}, {"local": "conv", "window": 5}, {"visual_weight": 0.1}],
)
def test_the_projector_equals_a_second_implementation(
    name: str, grid: tuple[int, int], settings: dict[str, Any], make_sub_images: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    projector = build_projector(name, vision_width=8, llm_width=12, k=4, state_size=3, **settings).double()
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    batch = make_sub_images(grid, width=8, dtype=torch.float64)
    output = projector(batch.features, batch.cls_attention, batch.grids)
    weights = {key: value.numpy() for key, value in projector.state_dict().items()}
    tokens, kept = project(batch.features[0].numpy(), batch.cls_attention[0].numpy(), grid, weights, projector.settings)
    assert output.indices[0].tolist() == kept
    np.testing.assert_allclose(output.tokens[0].detach().numpy(), tokens, rtol=1e-9, atol=1e-9)
