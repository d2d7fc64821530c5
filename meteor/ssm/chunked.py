"""Chunked scan in plain torch, for any device; its own backward pass recomputes the states chunk by chunk.

Letters: b, d, g, n, l are Mamba's names for sequences, channels, groups, state and steps. G is the number of (sequence,
group) pairs of a block, H = d / g channels per group, N = n, L = l, T steps per chunk, Q chunks.

Memory: the backward pass keeps the state at the start of each chunk. These are l / T states, while autograd through a
loop would keep all l. Everything else lives in three buffers of one chunk each.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meteor.ssm.tensors import accumulation_dtype

# Chunks of 8, 16 and 32 steps are about equally fast on a CPU; with 64 steps the buffers no longer fit its caches.
CHUNK_STEPS = 16
# State elements of a block of sequences; larger blocks no longer fit a CPU's caches either.
_BLOCK_ELEMENTS = 1 << 16


def selective_scan_chunked(
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
    """Run the selective scan chunk by chunk; see `meteor.ssm.selective_scan`. B and C have groups, (b, g, n, l)."""
    dtype = accumulation_dtype(u.dtype)
    u_bdl, delta_bdl = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        delta_bdl = delta_bdl + delta_bias.to(dtype).unsqueeze(1)
    if delta_softplus:
        delta_bdl = F.softplus(delta_bdl)
    y_bdl, _ = chunked_scan(u_bdl, delta_bdl, A.to(dtype), B.to(dtype), C.to(dtype))
    if D is not None:
        y_bdl = y_bdl + u_bdl * D.to(dtype).unsqueeze(1)
    if z is not None:
        y_bdl = y_bdl * F.silu(z.to(dtype))
    return y_bdl.to(u.dtype)


@torch.library.custom_op("meteor::chunked_scan", mutates_args=())
def chunked_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Compute h_l = exp(delta_l A) h_{l-1} + delta_l B_l u_l and y_l = C_l h_l; differentiable once in every argument.

    Args:
        u: input, (b, d, l), float32 or float64 like all arguments.
        delta: step size after bias and softplus, (b, d, l).
        A: state matrix, (d, n).
        B: input matrix, (b, g, n, l).
        C: output matrix, (b, g, n, l).

    Returns:
        The output y, (b, d, l), and the state before each chunk, (Q, b g, n, d / g), for the backward pass.
    """
    num_sequences, width, num_steps = u.shape
    y_lbd = u.new_empty(num_steps, num_sequences, width)
    start_QGNH = _empty_starts(u, B)
    for block in _blocks(u, delta, A, B, C):
        block.scan(y_lbd[:, block.sequences], start_QGNH[:, block.pairs])
    return y_lbd.permute(1, 2, 0), start_QGNH


@torch.library.custom_op("meteor::chunked_scan_backward", mutates_args=())
def chunked_scan_backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `chunked_scan` for u, delta, A, B and C.

    Args:
        dy: gradient of the output, (b, d, l).
        u, delta, A, B, C: arguments of `chunked_scan`.
        starts: state before each chunk, as `chunked_scan` returned it, (Q, b g, n, d / g).
    """
    grads = _empty_gradients(u, A, B)
    du_lbd, ddelta_lbd, dA_gnH, dB_lbgn, dC_lbgn = grads
    dA_gnH.zero_()
    for block in _blocks(u, delta, A, B, C):
        own = block.sequences
        block.scan_back(
            dy[own],
            starts[:, block.pairs],
            (du_lbd[:, own], ddelta_lbd[:, own], dA_gnH, dB_lbgn[:, own], dC_lbgn[:, own]),
        )
    return _in_mamba_shapes(*grads)


@chunked_scan.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    num_sequences, width, num_steps = u.shape
    return u.new_empty(num_steps, num_sequences, width).permute(1, 2, 0), _empty_starts(u, B)


@chunked_scan_backward.register_fake
def _(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _in_mamba_shapes(*_empty_gradients(u, A, B))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    return chunked_scan_backward(dy, *ctx.saved_tensors)


chunked_scan.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True)
class _Block:
    """Block of sequences, laid out for the scan: steps first, then a (G, N, H) state whose channels are contiguous."""

    sequences: slice
    pairs: slice
    u_LGH: Tensor
    delta_LGH: Tensor
    input_LGH: Tensor
    A_GNH: Tensor
    B_LGN: Tensor
    C_LGN: Tensor

    def scan(self, y_lbd: Tensor, start_QGNH: Tensor) -> None:
        """Write the outputs into ``y_lbd`` and the state before each chunk into ``start_QGNH``."""
        num_steps, num_pairs, num_channels = self.u_LGH.shape
        decay_TGNH, state_TGNH = self._buffers(2)
        y_LG1H = y_lbd.new_empty(num_steps, num_pairs, 1, num_channels)
        last_GNH = torch.zeros_like(self.A_GNH)
        for chunk, steps in enumerate(_chunks(num_steps)):
            start_QGNH[chunk] = last_GNH
            state = self._states(steps, start_QGNH[chunk], decay_TGNH, state_TGNH)
            last_GNH = state[-1].clone()
            torch.matmul(self.C_LGN[steps].unsqueeze(2), state, out=y_LG1H[steps])
        y_lbd.copy_(y_LG1H.reshape(y_lbd.shape))

    def scan_back(self, dy_bdl: Tensor, start_QGNH: Tensor, grads: tuple[Tensor, ...]) -> None:
        """Write the gradients of u, delta, B and C into ``grads``; add the gradient of A to its sum over blocks."""
        du_lbd, ddelta_lbd, dA_gnH, dB_lbgn, dC_lbgn = grads
        dy_LGH = dy_bdl.permute(2, 0, 1).reshape(self.u_LGH.shape)
        dinput_LGH, ddelta_LGH = torch.empty_like(dy_LGH), torch.empty_like(dy_LGH)
        dB_LGN, dC_LGN, dA_GNH = (
            torch.empty_like(self.B_LGN),
            torch.empty_like(self.C_LGN),
            torch.zeros_like(self.A_GNH),
        )
        decay_TGNH, state_TGNH, grad_TGNH = self._buffers(3)
        decay_steps, grad_steps = decay_TGNH.unbind(), grad_TGNH.unbind()
        # Gradient of a chunk's last state that flows back from the steps after the chunk.
        carry_GNH = torch.zeros_like(self.A_GNH)
        for chunk, steps in reversed(list(enumerate(_chunks(len(dy_LGH))))):
            state = self._states(steps, start_QGNH[chunk], decay_TGNH, state_TGNH)
            decay, grad = decay_TGNH[: len(state)], grad_TGNH[: len(state)]
            torch.mul(self.C_LGN[steps].unsqueeze(3), dy_LGH[steps].unsqueeze(2), out=grad)
            grad_steps[len(state) - 1].add_(carry_GNH)
            for step in range(len(state) - 2, -1, -1):
                grad_steps[step].addcmul_(decay_steps[step + 1], grad_steps[step + 1])
            torch.matmul(self.B_LGN[steps].unsqueeze(2), grad, out=dinput_LGH[steps].unsqueeze(2))
            carry_GNH = decay[0] * grad[0]
            # The gradient of delta A is decay x gradient x state before the step. Sums over channels multiply and add,
            # because a batched matrix product with a vector is several times slower here.
            dlog = decay.mul_(grad)
            torch.sum(grad.mul_(self.input_LGH[steps].unsqueeze(2)), 3, out=dB_LGN[steps])
            torch.sum(torch.mul(state, dy_LGH[steps].unsqueeze(2), out=grad), 3, out=dC_LGN[steps])
            dlog[0].mul_(start_QGNH[chunk])
            dlog[1:].mul_(state[:-1])
            dA_GNH += torch.mul(dlog, self.delta_LGH[steps].unsqueeze(2), out=grad).sum(0)
            torch.sum(dlog.mul_(self.A_GNH), 2, out=ddelta_LGH[steps])
        du_lbd.copy_((dinput_LGH * self.delta_LGH).reshape(du_lbd.shape))
        ddelta_lbd.copy_(ddelta_LGH.addcmul_(dinput_LGH, self.u_LGH).reshape(du_lbd.shape))
        dB_lbgn.copy_(dB_LGN.reshape(dB_lbgn.shape))
        dC_lbgn.copy_(dC_LGN.reshape(dC_lbgn.shape))
        dA_gnH += dA_GNH.unflatten(0, (-1, len(dA_gnH))).sum(0)

    def _states(self, steps: slice, start_GNH: Tensor, decay_TGNH: Tensor, state_TGNH: Tensor) -> Tensor:
        """Compute a chunk's decays and states in the buffers and return the states."""
        delta_TG1H = self.delta_LGH[steps].unsqueeze(2)
        decay, state = decay_TGNH[: len(delta_TG1H)], state_TGNH[: len(delta_TG1H)]
        # A in units of log 2 allows exp2, which is three times as fast as exp in torch on a CPU.
        torch.mul(delta_TG1H, self.A_GNH / math.log(2), out=decay).exp2_()
        torch.mul(self.B_LGN[steps].unsqueeze(3), self.input_LGH[steps].unsqueeze(2), out=state)
        before_GNH = start_GNH
        for decay_GNH, state_GNH in zip(decay.unbind(), state.unbind(), strict=True):
            before_GNH = state_GNH.addcmul_(decay_GNH, before_GNH)
        return state

    def _buffers(self, count: int) -> list[Tensor]:
        num_steps = min(CHUNK_STEPS, len(self.u_LGH))
        return [self.A_GNH.new_empty(num_steps, *self.A_GNH.shape) for _ in range(count)]


def _blocks(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Iterator[_Block]:
    num_sequences, width, _ = u.shape
    num_groups, num_states = B.shape[1:3]
    # A GPU gets everything as one block: fewer and larger launches.
    size = max(_BLOCK_ELEMENTS // (width * num_states), 1) if u.device.type == "cpu" else max(num_sequences, 1)
    A_gnH = A.reshape(num_groups, width // num_groups, num_states).transpose(1, 2)
    for first in range(0, num_sequences, size):
        own = slice(first, min(first + size, num_sequences))
        num_pairs = (own.stop - first) * num_groups

        def channels(tensor_bdl: Tensor, own: slice = own, num_pairs: int = num_pairs) -> Tensor:
            return tensor_bdl[own].permute(2, 0, 1).reshape(-1, num_pairs, width // num_groups).contiguous()

        def matrices(tensor_bgnl: Tensor, own: slice = own) -> Tensor:
            return tensor_bgnl[own].flatten(0, 1).permute(2, 0, 1).contiguous()

        u_LGH, delta_LGH = channels(u), channels(delta)
        yield _Block(
            own,
            slice(first * num_groups, own.stop * num_groups),
            u_LGH,
            delta_LGH,
            u_LGH * delta_LGH,
            A_gnH.repeat(own.stop - first, 1, 1),
            matrices(B),
            matrices(C),
        )


def _chunks(num_steps: int) -> Iterator[slice]:
    return (slice(first, min(first + CHUNK_STEPS, num_steps)) for first in range(0, num_steps, CHUNK_STEPS))


def _empty_starts(u: Tensor, B: Tensor) -> Tensor:
    num_sequences, num_groups, num_states, num_steps = B.shape
    num_chunks = (num_steps + CHUNK_STEPS - 1) // CHUNK_STEPS
    return u.new_empty(num_chunks, num_sequences * num_groups, num_states, u.shape[1] // num_groups)


def _empty_gradients(u: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_sequences, width, num_steps = u.shape
    num_groups, num_states = B.shape[1:3]
    du, ddelta = (u.new_empty(num_steps, num_sequences, width) for _ in range(2))
    dB, dC = (u.new_empty(num_steps, num_sequences, num_groups, num_states) for _ in range(2))
    return du, ddelta, u.new_empty(num_groups, num_states, width // num_groups), dB, dC


def _in_mamba_shapes(
    du_lbd: Tensor, ddelta_lbd: Tensor, dA_gnH: Tensor, dB_lbgn: Tensor, dC_lbgn: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        du_lbd.permute(1, 2, 0),
        ddelta_lbd.permute(1, 2, 0),
        dA_gnH.transpose(1, 2).flatten(0, 1),
        dB_lbgn.permute(1, 2, 3, 0),
        dC_lbgn.permute(1, 2, 3, 0),
    )
