"""Selective scan in Triton as a differentiable torch operation; `meteor.ssm.triton_scan_kernels` has the kernels.

Letters: b sequences, g groups, l steps, n states, e channels per group, m rows of the result, Q chunks.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from meteor.ssm.triton_scan_kernels import scan_backward, scan_forward

# Steps between saved states. The backward kernel holds the states of a chunk in registers, where those of 16 steps would
# not fit.
_CHUNK_STEPS = 8
# Channels per program: each of a warp's 32 threads has its own channel.
_BLOCK = 32
_MIN_STATES = 2


def selective_scan_triton(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """Run the selective scan in Triton; see `meteor.ssm.selective_scan`. B and C have groups, (b, g, n, l).

    Tensors (b, d, l) whose channels are neighbours in memory (views of (b, l, d)) are read in place; others are copied.
    """
    num_groups = B.shape[1]

    def by_group(channels_bdl: Tensor) -> Tensor:
        return channels_bdl.unflatten(1, (num_groups, -1)).permute(0, 3, 1, 2)

    y_blge = scan_rows(
        by_group(u),
        by_group(delta),
        A.unflatten(0, (num_groups, -1)),
        B.permute(0, 3, 1, 2),
        C.permute(0, 3, 1, 2),
        None if D is None else D.unflatten(0, (num_groups, -1)),
        None if delta_bias is None else delta_bias.unflatten(0, (num_groups, -1)),
        delta_softplus,
        # If a gate follows, the result stays in float32 until after the gate, and is rounded once.
        result_dtype=u.dtype if z is None else torch.float32,
    )
    y_bdl = y_blge.flatten(2).transpose(1, 2)
    return y_bdl if z is None else (y_bdl * F.silu(z.float())).to(u.dtype)


def scan_rows(
    u_blge: Tensor,
    delta_blge: Tensor,
    A_gen: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    D_ge: Tensor | None,
    bias_ge: Tensor | None,
    softplus: bool,
    *,
    result_dtype: torch.dtype,
    rows_bgl: Tensor | None = None,
    num_steps_b: Tensor | None = None,
    first_row: int = 0,
    num_rows: int | None = None,
) -> Tensor:
    """Scan every (sequence, group) and write the output of each step to its row of the result.

    Args:
        u_blge, delta_blge: input and step size, (b, l, g, e).
        A_gen: state matrix, (g, e, n).
        B_blgn, C_blgn: input and output matrix, (b, l, g, n).
        D_ge, bias_ge: skip connection and bias of delta, (g, e).
        softplus: whether delta goes through softplus.
        result_dtype: dtype of the result.
        rows_bgl: rows of the result, (b, g, l) integer: step s is written to row ``rows_bgl[:, :, s] - first_row``, and
            dropped if that is negative. If None, step s is written to row s.
        num_steps_b: number of steps of each sequence, (b,) integer, given with ``rows_bgl``; later steps are padding and
            are not scanned.
        first_row: value of ``rows_bgl`` that means row 0 of the result.
        num_rows: number of rows of the result, m; l if None.

    Returns:
        The outputs, (b, m, g, e), zero at rows that no step is written to.
    """
    y, _ = _scan(
        _last_contiguous(u_blge),
        _last_contiguous(delta_blge),
        A_gen.contiguous(),
        _last_contiguous(B_blgn),
        _last_contiguous(C_blgn),
        None if D_ge is None else D_ge.contiguous(),
        None if bias_ge is None else bias_ge.contiguous(),
        None if rows_bgl is None else rows_bgl.to(torch.int32),
        None if num_steps_b is None else num_steps_b.to(torch.int32),
        softplus,
        first_row,
        u_blge.shape[1] if num_rows is None else num_rows,
        result_dtype,
    )
    return y


@torch.library.custom_op("meteor::triton_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    num_steps: Tensor | None,
    softplus: bool,
    first_row: int,
    num_rows: int,
    result_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    y, starts = _empty_result(u, A, rows, num_rows, result_dtype), _empty_starts(u, A)
    if u.numel():
        with on_device_of(u):
            scan_forward[_launch_grid(u)](
                u, delta, A, B, C, D, bias, rows, num_steps, y, starts,
                first_row, u.shape[1], u.shape[2], u.shape[3], A.shape[2], starts.shape[2],
                *_strides(u, delta, B, C, y),
                **_constants(A, D, bias, rows, softplus),
            )  # fmt: skip
    return y, starts


@torch.library.custom_op("meteor::triton_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    num_steps: Tensor | None,
    starts: Tensor,
    softplus: bool,
    first_row: int,
) -> list[Tensor]:
    num_sequences, max_steps, num_groups, width = u.shape
    num_pairs, num_states = num_sequences * num_groups, A.shape[2]
    num_blocks = triton.cdiv(width, _BLOCK)
    du, ddelta = (
        tensor.new_empty(num_sequences, num_groups, max_steps, width, dtype=tensor.dtype) for tensor in (u, delta)
    )
    # Programs write parts of sums, which are added afterwards in a fixed order. Atomic additions would come in a random
    # order, and a run could not be repeated bit for bit.
    part_dA = starts.new_empty(num_pairs, num_states, width)
    part_dD, part_dbias = (starts.new_empty(num_pairs, width) for _ in range(2))
    part_dB, part_dC = (starts.new_empty(num_blocks, num_pairs, max_steps, num_states) for _ in range(2))
    if u.numel():
        with on_device_of(u):
            scan_backward[_launch_grid(u)](
                dy, u, delta, A, B, C, D, bias, rows, num_steps, starts,
                du, ddelta, part_dA, part_dB, part_dC, part_dD, part_dbias,
                first_row, max_steps, num_groups, width, num_states, starts.shape[2], num_pairs,
                *_strides(u, delta, B, C, dy),
                **_constants(A, D, bias, rows, softplus),
            )  # fmt: skip
    by_pair = (num_sequences, num_groups)
    dB, dC = (part.sum(0).unflatten(0, by_pair).transpose(1, 2).to(B.dtype).contiguous() for part in (part_dB, part_dC))
    return [
        du,
        ddelta,
        part_dA.unflatten(0, by_pair).sum(0).transpose(1, 2).to(A.dtype).contiguous(),
        dB,
        dC,
        *(
            part.unflatten(0, by_pair).sum(0).to(vector.dtype)
            for part, vector in ((part_dD, D), (part_dbias, bias))
            if vector is not None
        ),
    ]


@_scan.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    num_steps: Tensor | None,
    softplus: bool,
    first_row: int,
    num_rows: int,
    result_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _empty_result(u, A, rows, num_rows, result_dtype), _empty_starts(u, A)


@_scan_backward.register_fake
def _(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    num_steps: Tensor | None,
    starts: Tensor,
    softplus: bool,
    first_row: int,
) -> list[Tensor]:
    num_sequences, max_steps, num_groups, width = u.shape
    channels = (num_sequences, num_groups, max_steps, width)
    vectors = [torch.empty_like(vector) for vector in (D, bias) if vector is not None]
    matrices = [matrix.new_empty(matrix.shape) for matrix in (B, C)]
    return [u.new_empty(channels), delta.new_empty(channels), torch.empty_like(A), *matrices, *vectors]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, ctx.first_row, _, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    _, _, _, _, _, D, bias, *_ = ctx.saved_tensors
    du, ddelta, dA, dB, dC, *vectors = _scan_backward(dy.contiguous(), *ctx.saved_tensors, ctx.softplus, ctx.first_row)
    dD = vectors.pop(0) if D is not None else None
    dbias = vectors.pop(0) if bias is not None else None
    return du.transpose(1, 2), ddelta.transpose(1, 2), dA, dB, dC, dD, dbias, *[None] * 6


_scan.register_autograd(_backward, setup_context=_setup_context)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device current, because Triton launches kernels on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _launch_grid(u: Tensor) -> tuple[int, int]:
    return triton.cdiv(u.shape[3], _BLOCK), u.shape[0] * u.shape[2]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _constants(A: Tensor, D: Tensor | None, bias: Tensor | None, rows: Tensor | None, softplus: bool) -> dict[str, Any]:
    return {
        "HAS_D": D is not None,
        "HAS_BIAS": bias is not None,
        "SOFTPLUS": softplus,
        "BY_ROWS": rows is not None,
        "CHUNK": _CHUNK_STEPS,
        "STATES": max(triton.next_power_of_2(A.shape[2]), _MIN_STATES),
        "BLOCK": _BLOCK,
        "num_warps": 1,
    }


def _empty_result(u: Tensor, A: Tensor, rows: Tensor | None, num_rows: int, dtype: torch.dtype) -> Tensor:
    shape = (u.shape[0], num_rows, u.shape[2], u.shape[3])
    # No step writes to rows of padding, which must be finite: zeros instead of uninitialised memory.
    return u.new_empty(shape, dtype=dtype) if rows is None else u.new_zeros(shape, dtype=dtype)


def _empty_starts(u: Tensor, A: Tensor) -> Tensor:
    num_sequences, num_steps, num_groups, width = u.shape
    num_chunks = (num_steps + _CHUNK_STEPS - 1) // _CHUNK_STEPS
    return u.new_empty(num_sequences, num_groups, num_chunks, A.shape[2], width, dtype=torch.float32)
