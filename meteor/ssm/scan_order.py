"""Order in which a scan visits a sub-image: local summaries (TL), tokens (T) and the instruction token (INS).

Letters: B sub-images, P patches (largest number in the batch), L steps of the scan.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SCAN_MODES = ("single", "local_to_single")
DIRECTIONS = ("forward", "backward")


class ScanIndex(NamedTuple):
    """Visiting order of one direction as indices: from steps to rows, and from tokens back to steps.

    Attributes:
        order: row visited at each step, (B, L) long, an index into the concatenation ``[TL (P) | T (P) | INS (1)]``.
            Steps of padding point at INS.
        valid: True at real steps, (B, L) bool. Padding comes only after the last real step, so that a causal scan cannot
            carry it into a real step.
        token_steps: step at which T_i is visited, (B, P) long; 0 for patches of padding.
        instruction_step: step at which INS is visited, (B,) long.
    """

    order: Tensor
    valid: Tensor
    token_steps: Tensor
    instruction_step: Tensor


class ScanOrder(NamedTuple):
    """Visiting orders of a forward and a backward scan, side by side.

    Attributes:
        rows: row visited at each step, (B, 2, L) long, an index into ``[TL (P) | T (P) | INS (1)]``. Steps of padding
            point at INS and come after the last real step.
        num_steps: number of real steps, (B,) long.
        read_steps: steps at which T_1 ... T_P and INS are visited, (B, 2, P + 1) long; 0 for padding.
        has_summaries: whether the orders visit any TL.
    """

    rows: Tensor
    num_steps: Tensor
    read_steps: Tensor
    has_summaries: bool


def scan_order(num_patches_B: Tensor, max_patches: int, mode: str) -> ScanOrder:
    """Compute both directions of `scan_index`; arguments and errors are described there."""
    directions = [scan_index(num_patches_B, max_patches, mode, direction) for direction in DIRECTIONS]
    return ScanOrder(
        rows=torch.stack([index.order for index in directions], dim=1),
        num_steps=directions[0].valid.sum(dim=1),
        read_steps=torch.stack(
            [torch.cat([index.token_steps, index.instruction_step.unsqueeze(1)], dim=1) for index in directions], dim=1
        ),
        has_summaries=mode == "local_to_single",
    )


def scan_sequence(
    num_patches: int, *, mode: str = "local_to_single", direction: str = "forward"
) -> list[tuple[str, int]]:
    """Spell out the visiting order of one sub-image (LLaVA-Meteor, section 3.2, equation 1).

    The backward order is not the flip of the forward order: in both directions TL_i comes right before T_i. In both, INS
    stands between the patches ``num_patches // 2 - 1`` and ``num_patches // 2`` of the map.

    Args:
        num_patches: number of patches P, at least 0.
        mode: ``"single"`` (tokens T alone) or ``"local_to_single"``.
        direction: ``"forward"`` or ``"backward"``.

    Returns:
        Pairs ``(kind, patch)`` in visiting order; kind is ``"TL"``, ``"T"`` or ``"INS"``, patch counts from 0 and is -1 for
        INS.

    Raises:
        ValueError: the mode or direction is unknown (``"both"`` names two sequences), or the count is negative.
    """
    _check(mode, direction)
    if num_patches < 0:
        raise ValueError(f"num_patches is {num_patches}; a sub-image has at least 0 patches.")
    kinds = ("TL", "T") if mode == "local_to_single" else ("T",)
    halves = [range(num_patches // 2), range(num_patches // 2, num_patches)]
    if direction == "backward":
        halves = [half[::-1] for half in reversed(halves)]
    before, after = ([(kind, patch) for patch in half for kind in kinds] for half in halves)
    return [*before, ("INS", -1), *after]


def scan_index(num_patches_B: Tensor, max_patches: int, mode: str, direction: str) -> ScanIndex:
    """Compute the visiting orders of a batch of sub-images at once; each order equals its `scan_sequence`.

    Args:
        num_patches_B: number of patches of each sub-image, (B,) integer, at most ``max_patches``. Nothing is read back
            to the host.
        max_patches: padded number of patches, P.
        mode: ``"single"`` or ``"local_to_single"``.
        direction: ``"forward"`` or ``"backward"``.

    Returns:
        `ScanIndex` with L = P + 1 (``"single"``) or 2 P + 1 (``"local_to_single"``) steps.

    Raises:
        ValueError: the mode or direction is unknown.
    """
    _check(mode, direction)
    steps_per_patch = 2 if mode == "local_to_single" else 1
    num_B1 = num_patches_B.to(torch.long).unsqueeze(1)
    num_before_B1 = num_B1 // 2 if direction == "forward" else num_B1 - num_B1 // 2
    instruction_B1 = steps_per_patch * num_before_B1
    device = num_patches_B.device

    step_L = torch.arange(steps_per_patch * max_patches + 1, device=device)
    # Number of each step when INS is left out: every patch has steps_per_patch consecutive numbers.
    slot_BL = step_L - (step_L > instruction_B1).long()
    rank_BL = slot_BL // steps_per_patch
    patch_BL = rank_BL if direction == "forward" else num_B1 - 1 - rank_BL
    is_token_BL = slot_BL % steps_per_patch == steps_per_patch - 1
    valid_BL = step_L < steps_per_patch * num_B1 + 1
    is_patch_BL = valid_BL & (step_L != instruction_B1)
    order_BL = torch.where(is_patch_BL, patch_BL + is_token_BL.long() * max_patches, 2 * max_patches)

    patch_P = torch.arange(max_patches, device=device)
    rank_BP = patch_P.expand(num_B1.shape[0], -1) if direction == "forward" else num_B1 - 1 - patch_P
    token_slot_BP = steps_per_patch * rank_BP + steps_per_patch - 1
    token_step_BP = token_slot_BP + (token_slot_BP >= instruction_B1).long()
    token_step_BP = torch.where(patch_P < num_B1, token_step_BP, 0)
    return ScanIndex(order_BL, valid_BL, token_step_BP, instruction_B1.squeeze(1))


def _check(mode: str, direction: str) -> None:
    if mode == "both":
        raise ValueError("mode 'both' is two sequences: ask for 'single' and 'local_to_single', one after the other.")
    if mode not in SCAN_MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(SCAN_MODES)}.")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; it must be one of {', '.join(DIRECTIONS)}.")
