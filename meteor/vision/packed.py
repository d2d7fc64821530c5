"""Pass of a CLIP vision tower over sub-images of mixed patch grids, whose tokens are packed without padding.

Operations on single tokens (norms, projections, MLP) see all tokens at once; attention runs over groups of equal length.

Letters: N sub-images, T tokens of all sub-images, L tokens per sub-image (1 + P, the class token first), P patches, F values
of a patch's pixels, C vision width, H heads, Q head width, A attention layers, X any width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as functional


@dataclass(frozen=True)
class Run:
    """Neighbours of equal shape in a packed row.

    Attributes:
        start: index of the run's first token.
        num: number of sub-images, N.
        length: tokens per sub-image, L.
        grid: patch rows and columns (Hu, Wu).
    """

    start: int
    num: int
    length: int
    grid: tuple[int, int]

    @property
    def end(self) -> int:
        return self.start + self.num * self.length

    def of(self, packed_TX: torch.Tensor) -> torch.Tensor:
        """Return this run's part of a packed (T, X) tensor as (N, L, X), without a copy."""
        return packed_TX[self.start : self.end].view(self.num, self.length, -1)

    def heads(self, packed_TC: torch.Tensor, num_heads: int) -> torch.Tensor:
        """Return this run's part of a packed (T, C) tensor as (N, H, L, Q), without a copy."""
        return self.of(packed_TC).unflatten(-1, (num_heads, -1)).transpose(1, 2)


@dataclass(frozen=True)
class Packed:
    """Output of the tower for a packed row.

    Attributes:
        runs: runs of sub-images in packed order.
        selected: tokens of the selected layer, (T, C).
        attention: class-token attention of each run, (N, A, P) float32.
        finite: whether tokens and attention of each sub-image are finite, (N,) bool over all runs.
    """

    runs: list[Run]
    selected: torch.Tensor
    attention: list[torch.Tensor]
    finite: torch.Tensor


def plan_runs(grids: Sequence[tuple[int, int]]) -> list[Run]:
    """Group sub-images into runs; equal grids must be neighbours."""
    runs, start = [], 0
    for grid, same in groupby(grids):
        runs.append(Run(start, len(list(same)), 1 + grid[0] * grid[1], grid))
        start = runs[-1].end
    return runs


def run_tower(
    model: Any,
    pixels: Sequence[torch.Tensor],
    runs: Sequence[Run],
    *,
    positions: Sequence[torch.Tensor],
    select_block: int,
    attention_blocks: Sequence[int],
) -> Packed:
    """Embed the patches and run the blocks up to the last required block.

    Args:
        model: CLIP vision tower.
        pixels: normalised sub-images (3, h, w) in the order of ``runs``, on the tower's device.
        runs: runs from `plan_runs`.
        positions: position embeddings of each run, (L, C).
        select_block: index, from 0, of the block whose output is selected.
        attention_blocks: indices, from 0, of blocks whose class-token attention is returned, in that order.
    """
    hidden_TC = _embed(model, pixels, runs, positions)
    selected_TC, last = hidden_TC, max([select_block, *attention_blocks])
    rows: dict[int, list[torch.Tensor]] = {}
    lengths = merge_lengths(runs)
    for i, block in enumerate(model.encoder.layers[: last + 1]):
        if i == select_block + 1:
            hidden_TC = hidden_TC.clone()  # later blocks add in place and would change the selected tokens
        wanted = runs if i in attention_blocks else ()
        # If the last block comes after the selected block, only its attention is read, not its output.
        rows[i] = _attention_half(block, hidden_TC, lengths, wanted, rows_only=i == last > select_block)
        if i == last > select_block:
            break
        hidden_TC.add_(_mlp(block.mlp, block.layer_norm2(hidden_TC)))
        if i == select_block:
            selected_TC = hidden_TC
    attention = [torch.stack([rows[i][r] for i in attention_blocks], dim=1) for r in range(len(runs))]
    return Packed(list(runs), selected_TC, attention, _finite(runs, selected_TC, attention))


def merge_lengths(runs: Sequence[Run]) -> list[Run]:
    """Merge neighbouring runs of equal length, because attention does not depend on the grid."""
    merged: list[Run] = []
    for run in runs:
        if merged and merged[-1].length == run.length:
            merged[-1] = replace(merged[-1], num=merged[-1].num + run.num)
        else:
            merged.append(run)
    return merged


def _embed(
    model: Any, pixels: Sequence[torch.Tensor], runs: Sequence[Run], positions: Sequence[torch.Tensor]
) -> torch.Tensor:
    embeddings = model.embeddings
    weight_CF = embeddings.patch_embedding.weight.flatten(1)
    patches, first = [], 0
    for run in runs:
        patches.append(_patches(torch.stack(list(pixels[first : first + run.num])), run.grid))
        first += run.num
    embedded_PC = functional.linear(torch.cat(patches).to(weight_CF.dtype), weight_CF)
    hidden_TC = embedded_PC.new_empty(runs[-1].end, embedded_PC.shape[-1])
    start = 0
    for run, position_LC in zip(runs, positions, strict=True):
        end = start + run.num * (run.length - 1)
        tokens_NLC = run.of(hidden_TC)
        tokens_NLC[:, 0] = embeddings.class_embedding + position_LC[0]
        tokens_NLC[:, 1:] = embedded_PC[start:end].view(run.num, run.length - 1, -1) + position_LC[1:]
        start = end
    return model.pre_layrnorm(hidden_TC)


def _patches(pixels_N3HW: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Cut pixels into patches, (N * P, F), with values in the order of the embedding's weights: colour, row, column."""
    rows, columns = grid
    split = pixels_N3HW.unflatten(2, (rows, -1)).unflatten(4, (columns, -1))
    return split.permute(0, 2, 4, 1, 3, 5).reshape(len(pixels_N3HW) * rows * columns, -1)


def _attention_half(
    block: Any, hidden_TC: torch.Tensor, lengths: Sequence[Run], wanted: Sequence[Run], *, rows_only: bool
) -> list[torch.Tensor]:
    """Add the block's attention to the hidden state and return the class token's attention for the runs ``wanted``."""
    attention, normed_TC = block.self_attn, block.layer_norm1(hidden_TC)
    q_TC, k_TC = attention.q_proj(normed_TC), attention.k_proj(normed_TC)
    rows = [_class_token_row(run, q_TC, k_TC, attention.num_heads) for run in wanted]
    if rows_only:
        return rows
    v_TC, mixed_TC = attention.v_proj(normed_TC), torch.empty_like(q_TC)
    for run in lengths:
        q_NHLQ, k_NHLQ, v_NHLQ, out_NHLQ = (
            run.heads(packed, attention.num_heads) for packed in (q_TC, k_TC, v_TC, mixed_TC)
        )
        out_NHLQ.copy_(functional.scaled_dot_product_attention(q_NHLQ, k_NHLQ, v_NHLQ))
    hidden_TC.add_(attention.out_proj(mixed_TC))
    return rows


def _class_token_row(run: Run, q_TC: torch.Tensor, k_TC: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return the class token's attention to patches, softmax(q k^T / sqrt(Q)), mean over heads, (N, P) float32."""
    q_NHQ = run.heads(q_TC, num_heads)[:, :, 0].float()
    k_NHLQ = run.heads(k_TC, num_heads).float()
    scores_NHL = (k_NHLQ @ q_NHQ[..., None]).squeeze(-1) * q_NHQ.shape[-1] ** -0.5
    return scores_NHL.softmax(dim=-1)[:, :, 1:].mean(dim=1)


def _mlp(mlp: Any, normed_TC: torch.Tensor) -> torch.Tensor:
    inner = mlp.fc1(normed_TC)
    if mlp.config.hidden_act == "quick_gelu":
        # The formula of transformers with two temporary tensors less; they would be the largest tensors of a block.
        return mlp.fc2(inner.mul_((1.702 * inner).sigmoid_()))
    return mlp.fc2(mlp.activation_fn(inner))


def _finite(runs: Sequence[Run], selected_TC: torch.Tensor, attention_NAP: Sequence[torch.Tensor]) -> torch.Tensor:
    # A token's largest magnitude is finite only if all its values are: NaN spreads to it, and infinity is the largest.
    largest_T = torch.linalg.vector_norm(selected_TC, ord=float("inf"), dim=1)
    tokens = [run.of(largest_T[:, None]).flatten(1).isfinite().all(dim=1) for run in runs]
    rows = [run_NAP.flatten(1).isfinite().all(dim=1) for run_NAP in attention_NAP]
    return torch.cat(tokens) & torch.cat(rows)
