"""Pass of a vision tower over sub-images of mixed patch grids, whose tokens are packed without padding.

Operations on single tokens (norms, projections, MLP) see all tokens at once; attention runs over groups of equal length.

Letters: N sub-images, T tokens of all sub-images, L tokens per sub-image (R + P, the prefix tokens first), R prefix tokens, P
patches, F values of a patch's pixels, C vision width, H heads, Q head width, A attention layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional

from meteor.vision.importance import class_token_row, pooling_row, received_row
from meteor.vision.runs import Run, merge_lengths
from meteor.vision.towers import Importance, Tower
from meteor.vision.towers.protocol import Block, Map, Position

_ROW_READERS = {"class_token": class_token_row, "attention_received": received_row}
# Reads the importance row of a run from packed queries and keys.
_RowReader = Callable[[Run, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Packed:
    """Output of the tower for a packed row.

    Attributes:
        runs: runs of sub-images in packed order.
        selected: tokens of the selected layer, (T, C).
        attention: importance rows of each run, (N, A, P) float32.
        finite: whether tokens and attention of each sub-image are finite, (N,) bool over all runs.
    """

    runs: list[Run]
    selected: torch.Tensor
    attention: list[torch.Tensor]
    finite: torch.Tensor


def run_tower(
    tower: Tower,
    pixels: Sequence[torch.Tensor],
    runs: Sequence[Run],
    *,
    positions: Sequence[Position],
    select_block: int,
    attention_blocks: Sequence[int],
    importance: Importance = "class_token",
) -> Packed:
    """Embed the patches and run the blocks up to the last required block.

    Args:
        tower: vision tower.
        pixels: normalised sub-images (3, h, w) in the order of ``runs``, on the tower's device.
        runs: runs from `plan_runs`.
        positions: positions of each run.
        select_block: index, from 0, of the block whose output is selected.
        attention_blocks: indices, from 0, of blocks whose importance row is returned, in that order. The pooling query has a
            single row, after the last block, which stands for each of them.
        importance: kind of the importance row.
    """
    pools = importance == "pooling_query"
    num_heads = tower.model.config.num_attention_heads

    def read_row(run: Run, q_TC: torch.Tensor, k_TC: torch.Tensor) -> torch.Tensor:
        return _ROW_READERS[importance](run, q_TC, k_TC, num_heads, tower.num_prefix)

    attend = _Attention(num_heads, tower.num_prefix, runs, merge_lengths(runs), positions, read_row)
    hidden_TC = _embed(tower, pixels, runs, positions)
    last = len(tower.blocks) - 1 if pools else max([select_block, *attention_blocks])
    read_from = () if pools else attention_blocks
    # If the last block comes after the selected block, only its attention is read, not its output.
    rows_only = last > select_block and not pools
    selected_TC, hidden_TC, rows = _run_blocks(
        tower.blocks[: last + 1], hidden_TC, attend, select_block, read_from, rows_only
    )
    if pools:
        attention = _pooling_rows(tower, hidden_TC, runs, len(attention_blocks))
    else:
        attention = [torch.stack([rows[i][r] for i in attention_blocks], dim=1) for r in range(len(runs))]
    return Packed(list(runs), selected_TC, attention, _finite(runs, selected_TC, attention))


def _run_blocks(
    blocks: Sequence[Block],
    hidden_TC: torch.Tensor,
    attend: "_Attention",
    select_block: int,
    read_from: Sequence[int],
    rows_only: bool,
) -> tuple[torch.Tensor, torch.Tensor, dict[int, list[torch.Tensor]]]:
    """Return selected tokens, the last block's output, and block -> importance rows; ``rows_only`` holds for the last block."""
    selected_TC, last = hidden_TC, len(blocks) - 1
    rows: dict[int, list[torch.Tensor]] = {}
    for i, block in enumerate(blocks):
        if i == select_block + 1:
            hidden_TC = hidden_TC.clone()  # later blocks add in place and would change the selected tokens
        rows[i] = attend(block, hidden_TC, reads=i in read_from, rows_only=rows_only and i == last)
        if rows_only and i == last:
            break
        hidden_TC.add_(_scaled(_mlp(block.mlp, block.norm2(hidden_TC)), block.scale2))
        if i == select_block:
            selected_TC = hidden_TC
    return selected_TC, hidden_TC, rows


def _embed(
    tower: Tower, pixels: Sequence[torch.Tensor], runs: Sequence[Run], positions: Sequence[Position]
) -> torch.Tensor:
    weight_CF, bias_C = tower.patch_projection()
    patches, first = [], 0
    for run in runs:
        patches.append(_patches(torch.stack(list(pixels[first : first + run.num])), run.grid))
        first += run.num
    embedded_PC = functional.linear(torch.cat(patches).to(weight_CF.dtype), weight_CF, bias_C)
    hidden_TC = embedded_PC.new_empty(runs[-1].end, embedded_PC.shape[-1])
    start, num_prefix = 0, tower.num_prefix
    for run, position in zip(runs, positions, strict=True):
        end = start + run.num * (run.length - num_prefix)
        tokens_NLC, patches_NPC = run.of(hidden_TC), embedded_PC[start:end].view(run.num, run.length - num_prefix, -1)
        tokens_NLC[:, :num_prefix] = position.prefix
        tokens_NLC[:, num_prefix:] = patches_NPC if position.patches is None else patches_NPC + position.patches
        start = end
    return tower.begin(hidden_TC)


def _patches(pixels_N3HW: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Cut pixels into patches, (N * P, F), with values in the order of the embedding's weights: colour, row, column."""
    rows, columns = grid
    split = pixels_N3HW.unflatten(2, (rows, -1)).unflatten(4, (columns, -1))
    return split.permute(0, 2, 4, 1, 3, 5).reshape(len(pixels_N3HW) * rows * columns, -1)


@dataclass(frozen=True)
class _Attention:
    """Attention of a packed row.

    Attributes:
        num_heads: attention heads, H.
        num_prefix: prefix tokens, R.
        runs: runs of equal grids.
        lengths: runs of equal lengths, made of neighbours in ``runs``.
        positions: positions of each of ``runs``.
        read_row: reader of importance rows.
    """

    num_heads: int
    num_prefix: int
    runs: Sequence[Run]
    lengths: Sequence[Run]
    positions: Sequence[Position]
    read_row: _RowReader

    def __call__(self, block: Block, hidden_TC: torch.Tensor, *, reads: bool, rows_only: bool) -> list[torch.Tensor]:
        """Add the block's attention to the hidden state, and return each run's importance row if ``reads``."""
        normed_TC = block.norm1(hidden_TC)
        q_TC, k_TC = self._rotated(block.q(normed_TC)), self._rotated(block.k(normed_TC))
        rows = [self.read_row(run, q_TC, k_TC) for run in self.runs] if reads else []
        if rows_only:
            return rows
        v_TC, mixed_TC = block.v(normed_TC), torch.empty_like(q_TC)
        for run in self.lengths:
            q_NHLQ, k_NHLQ, v_NHLQ, out_NHLQ = (
                run.heads(packed, self.num_heads) for packed in (q_TC, k_TC, v_TC, mixed_TC)
            )
            out_NHLQ.copy_(functional.scaled_dot_product_attention(q_NHLQ, k_NHLQ, v_NHLQ))
        hidden_TC.add_(_scaled(block.out(mixed_TC), block.scale1))
        return rows

    def _rotated(self, packed_TC: torch.Tensor) -> torch.Tensor:
        """Rotate the patches' part in place (RoPE); prefix tokens have no position."""
        for run, position in zip(self.runs, self.positions, strict=True):
            if position.rotary is not None:
                cos_PQ, sin_PQ = position.rotary
                patches_NHPQ = run.heads(packed_TC, self.num_heads)[:, :, self.num_prefix :]
                first, second = patches_NHPQ.chunk(2, dim=-1)
                patches_NHPQ.copy_(patches_NHPQ * cos_PQ + torch.cat((-second, first), dim=-1) * sin_PQ)
        return packed_TC


def _pooling_rows(tower: Tower, hidden_TC: torch.Tensor, runs: Sequence[Run], num_layers: int) -> list[torch.Tensor]:
    head = tower.pooling_head()
    assert head is not None, "the encoder has checked that the tower has a pooling head"
    final_TC = head.norm(hidden_TC)
    return [pooling_row(run, final_TC, head)[:, None].expand(-1, num_layers, -1) for run in runs]


def _scaled(output_TC: torch.Tensor, scale: Map | None) -> torch.Tensor:
    return output_TC if scale is None else scale(output_TC)


def _mlp(mlp: Any, normed_TC: torch.Tensor) -> torch.Tensor:
    if hasattr(mlp, "fc1") and mlp.config.hidden_act == "quick_gelu":
        # The formula of transformers with two temporary tensors less; they would be the largest tensors of a block.
        inner = mlp.fc1(normed_TC)
        return mlp.fc2(inner.mul_((1.702 * inner).sigmoid_()))
    return mlp(normed_TC)


def _finite(runs: Sequence[Run], selected_TC: torch.Tensor, attention_NAP: Sequence[torch.Tensor]) -> torch.Tensor:
    # A token's largest magnitude is finite only if all its values are: NaN spreads to it, and infinity is the largest.
    largest_T = torch.linalg.vector_norm(selected_TC, ord=float("inf"), dim=1)
    tokens = [run.of(largest_T[:, None]).flatten(1).isfinite().all(dim=1) for run in runs]
    rows = [run_NAP.flatten(1).isfinite().all(dim=1) for run_NAP in attention_NAP]
    return torch.cat(tokens) & torch.cat(rows)
