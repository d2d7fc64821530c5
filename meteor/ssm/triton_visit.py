"""Triton version of `meteor.ssm.visit.visit_rows` that includes the window mean.

The kernels are in `meteor.ssm.triton_visit_kernels`.

Letters: B sub-images, P patches, M = P + 1 rows (tokens, then INS), L scan steps, E scan channels per direction, W = 2 E,
X channels of the rows: E if the directions share them, otherwise W.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from meteor.ssm.scan_order import ScanOrder
from meteor.ssm.triton_scan import on_device_of
from meteor.ssm.triton_visit_kernels import rows_backward, visit_backward, visit_forward

NUM_TAPS = 4
_SEGMENT_STEPS = 128
_BLOCK = 128
_NUM_WARPS = 2


def visit_windows(
    row_BMX: Tensor, grids: Tensor, order: ScanOrder, weight_W1K: Tensor, bias_W: Tensor, *, window: int
) -> Tensor:
    """Return SiLU(conv(rows in visiting order)), in which each TL is the mean of a window.

    Args:
        row_BMX: rows T_1 ... T_P and INS, (B, M, X). If X = W, each direction has its own half.
        grids: patch grid (Hu, Wu) of each sub-image, (B, 2) integer.
        order: visiting orders of both directions.
        weight_W1K: weight of a causal depth-wise convolution, (W, 1, 4).
        bias_W: bias of the convolution, (W,).
        window: odd side of the window in patches; ignored if the order visits no TL.

    Returns:
        The visited rows, (B, L, W), the forward direction's channels first; zero at padding.
    """
    return _visit(
        row_BMX.contiguous(),
        order.rows.to(torch.int32),
        order.num_steps.to(torch.int32),
        grids.to(row_BMX.device, torch.int32),
        weight_W1K.contiguous(),
        bias_W.contiguous(),
        window // 2 if order.has_summaries else 0,
    )


@torch.library.custom_op("meteor::triton_visit", mutates_args=())
def _visit(
    x: Tensor, order: Tensor, num_steps: Tensor, grids: Tensor, weight: Tensor, bias: Tensor, half: int
) -> Tensor:
    u = _empty_result(x, order, bias)
    num_sub_images, max_steps, width = u.shape[0], u.shape[1], len(bias) // 2
    if num_sub_images:
        with on_device_of(x):
            visit_forward[_launch_grid(width, max_steps, num_sub_images)](
                x, order, num_steps, grids, weight, bias, u,
                x.shape[1] - 1, max_steps, width, *_strides(x, bias),
                **_constants(half),
            )  # fmt: skip
    return u


@torch.library.custom_op("meteor::triton_visit_backward", mutates_args=())
def _visit_backward(
    du: Tensor, x: Tensor, order: Tensor, num_steps: Tensor, grids: Tensor, weight: Tensor, bias: Tensor, half: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_sub_images, max_steps, width = x.shape[0], order.shape[2], len(bias) // 2
    num_rows, num_patches = x.shape[1], x.shape[1] - 1
    first_row = 0 if half else num_patches
    num_segments = triton.cdiv(max_steps, _SEGMENT_STEPS)
    # Zeros, because rows of padding are never visited and get no gradient from the kernel.
    dtable = x.new_zeros(num_sub_images, 2, num_patches + num_rows - first_row, width)
    # Programs write parts of sums, which are added afterwards in a fixed order: runs repeat bit for bit.
    part_dweight = x.new_empty(num_sub_images, num_segments, 2 * width, NUM_TAPS, dtype=torch.float32)
    part_dbias = x.new_empty(num_sub_images, num_segments, 2 * width, dtype=torch.float32)
    dx = x.new_empty(x.shape)
    shared = x.shape[2] == width
    if num_sub_images:
        with on_device_of(x):
            visit_backward[_launch_grid(width, max_steps, num_sub_images)](
                du, x, order, num_steps, grids, weight, bias, dtable, part_dweight, part_dbias,
                num_patches, max_steps, width, num_segments, first_row, dtable.shape[2], *_strides(x, bias),
                **_constants(half),
            )  # fmt: skip
            rows_backward[(triton.cdiv(width, _BLOCK), num_rows, num_sub_images * (1 if shared else 2))](
                dtable, grids, dx,
                num_patches, width, num_rows, dtable.shape[2],
                SHARED=shared, HALF=half, BLOCK=_BLOCK, num_warps=_NUM_WARPS,
            )  # fmt: skip
    dweight, dbias = part_dweight.sum((0, 1)), part_dbias.sum((0, 1))
    return dx, dweight.reshape(weight.shape).to(weight.dtype), dbias.to(bias.dtype)


@_visit.register_fake
def _(x: Tensor, order: Tensor, num_steps: Tensor, grids: Tensor, weight: Tensor, bias: Tensor, half: int) -> Tensor:
    return _empty_result(x, order, bias)


@_visit_backward.register_fake
def _(
    du: Tensor, x: Tensor, order: Tensor, num_steps: Tensor, grids: Tensor, weight: Tensor, bias: Tensor, half: int
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.half = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = _visit_backward(du.contiguous(), *ctx.saved_tensors, ctx.half)
    return dx, None, None, None, dweight, dbias, None


_visit.register_autograd(_backward, setup_context=_setup_context)


def _launch_grid(width: int, max_steps: int, num_sub_images: int) -> tuple[int, int, int]:
    return triton.cdiv(width, _BLOCK), triton.cdiv(max_steps, _SEGMENT_STEPS), 2 * num_sub_images


def _strides(x: Tensor, bias: Tensor) -> tuple[int, int, int]:
    """Return the strides of sub-images, rows and directions in ``x``."""
    width = len(bias) // 2
    return x.stride(0), x.stride(1), 0 if x.shape[2] == width else width


def _constants(half: int) -> dict[str, int]:
    return {"HALF": half, "SEGMENT": _SEGMENT_STEPS, "BLOCK": _BLOCK, "num_warps": _NUM_WARPS}


def _empty_result(x: Tensor, order: Tensor, bias: Tensor) -> Tensor:
    # torch.compile takes len() of a tensor as a constant, which keeps the width out of its symbolic shapes.
    return x.new_empty(x.shape[0], order.shape[2], len(bias))
