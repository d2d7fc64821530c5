"""Reference scan: the recurrence step by step, as the paper writes it. Every other backend is compared with it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from meteor.ssm.tensors import accumulation_dtype


def selective_scan_reference(
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
    """Run the selective scan step by step; see `meteor.ssm.selective_scan`. B and C have groups, (b, g, n, l).

    The state is float32 (float64 for float64 inputs). The function is for comparison, not for training: under autograd each
    step keeps several (b, d, n) tensors and adds to gradients of the whole sequence.
    """
    result_dtype, dtype = u.dtype, accumulation_dtype(u.dtype)
    channels_per_group = u.shape[1] // B.shape[1]
    u, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype).unsqueeze(1)
    if delta_softplus:
        delta = F.softplus(delta)

    state_bdn = u.new_zeros(u.shape[0], *A.shape)
    outputs: list[Tensor] = []
    for step in range(u.shape[-1]):
        u_bd, delta_bd, B_bgn, C_bgn = (tensor[..., step] for tensor in (u, delta, B, C))
        B_bdn, C_bdn = (matrix.repeat_interleave(channels_per_group, dim=1) for matrix in (B_bgn, C_bgn))
        decay_bdn = torch.exp(delta_bd.unsqueeze(-1) * A)
        state_bdn = decay_bdn * state_bdn + (delta_bd * u_bd).unsqueeze(-1) * B_bdn
        outputs.append((C_bdn * state_bdn).sum(dim=-1))
    y = torch.stack(outputs, dim=-1)

    if D is not None:
        y = y + D.to(dtype).unsqueeze(1) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(result_dtype)
