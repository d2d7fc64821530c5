"""FLOPs of a projector's pass, its scan included.

Letters: B sub-images, L steps of the scan, G directions, E scan channels, N scan state, R rank of Delta's projection.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meteor.ssm.block import CONV_WIDTH, BidirectionalScan
from meteor.ssm.scan_order import DIRECTIONS, ScanOrder


@torch.no_grad()
def count_projector_flops(
    projector: nn.Module, features: Tensor, cls_attention: Tensor, grids: Tensor, **options: Any
) -> int:
    """Count the FLOPs of one pass; they depend on the shapes and grids alone, not on values, device or scan backend.

    torch counts every matrix product and convolution of the pass, padding of mixed grids included. A scan has other
    operations on each backend, so it counts by `scan_flops` instead. Other operations per element count nothing.
    ``options`` are further arguments of the projector, such as ``k``.
    """
    counted_here = 0

    def add(scan: BidirectionalScan, arguments: tuple[Tensor, Tensor, ScanOrder], _: Any) -> None:
        nonlocal counted_here
        counted_here += scan_flops(scan, arguments[2])

    scans = {name: module for name, module in projector.named_modules() if isinstance(module, BidirectionalScan)}
    hooks = [scan.register_forward_hook(add) for scan in scans.values()]
    try:
        # The CPU's fused attention is not counted; its plain form is.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            projector(features, cls_attention, grids, **options)
    finally:
        for hook in hooks:
            hook.remove()
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    root = type(projector).__name__
    inside = sum(by_module.get(f"{root}.{name}", 0) - by_module.get(f"{root}.{name}.local", 0) for name in scans)
    return counter.get_total_flops() - inside + counted_here


def scan_flops(scan: BidirectionalScan, order: ScanOrder) -> int:
    """Count one call of a scan without its local summaries.

    Each step and channel costs 2 x 4 FLOPs in the causal convolution, and 2 (R + 2 N) + 2 R in the projections to Delta, B
    and C. The recurrence costs 9 N + 2: Mamba's authors count 9 per state (``flops_selective_scan_ref``), and the skip
    connection costs 2.
    """
    num_rows, _, num_steps = order.rows.shape
    dt_rank, state_size, _ = scan.sizes
    per_channel = 2 * CONV_WIDTH + 2 * (dt_rank + 2 * state_size) + 2 * dt_rank + 9 * state_size + 2
    return num_rows * num_steps * len(DIRECTIONS) * scan.inner_width * per_channel
