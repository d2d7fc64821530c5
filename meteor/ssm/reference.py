"""The reference scan: a plain loop over time, one fused update a step, that every other backend is compared with.

Letters: b, d, g, n, l are mamba's names for sequences, channels, groups, state and steps; G = b g (sequence, group)
pairs, H = d / g channels of a group, N and L as n and l.
"""

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
    """Run the selective scan step by step; arguments and result as in `meteor.ssm.selective_scan`.

    The state is float32 (float64 for float64 inputs). Without gradients the largest tensors are of the inputs' size;
    with them, autograd keeps each step's state and decay, (b, d, l, n) twice.
    """
    dtype = accumulation_dtype(u.dtype)
    u_lbd = _steps_first(u, dtype)
    delta_lbd = _steps_first(delta, dtype)
    if delta_bias is not None:
        delta_lbd = delta_lbd + delta_bias.to(dtype)
    if delta_softplus:
        delta_lbd = F.softplus(delta_lbd)
    y_lbd = _scan(u_lbd, delta_lbd, A.to(dtype), _with_groups(B).to(dtype), _with_groups(C).to(dtype))
    if D is not None:
        y_lbd = y_lbd + u_lbd * D.to(dtype)
    if z is not None:
        y_lbd = y_lbd * F.silu(_steps_first(z, dtype))
    return y_lbd.permute(1, 2, 0).to(u.dtype)


def _steps_first(channels_bdl: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, d, l) to (l, b, d), contiguous: a step's slice is one piece of memory, channels side by side."""
    return channels_bdl.permute(2, 0, 1).to(dtype).contiguous()


def _with_groups(matrix: Tensor) -> Tensor:
    return matrix.unsqueeze(1) if matrix.dim() == 3 else matrix


def _scan(u_lbd: Tensor, delta_lbd: Tensor, A_dn: Tensor, B_bgnl: Tensor, C_bgnl: Tensor) -> Tensor:
    """h_l = exp(delta_l A) h_{l-1} + delta_l B_l u_l and y_l = C_l h_l, over l; (l, b, d) to (l, b, d)."""
    num_sequences, num_groups, num_states, num_steps = B_bgnl.shape
    num_channels = u_lbd.shape[2] // num_groups
    # One small problem for each (sequence, group), G = b g of them. The state is (G, N, H), channels last: exp, multiply
    # and add run along channels, and the read-out over n is a matrix product.
    by_group = (num_steps, num_sequences * num_groups, 1, num_channels)
    A_GNH = A_dn.reshape(num_groups, num_channels, num_states).transpose(1, 2).repeat(num_sequences, 1, 1)
    delta_LG1H = delta_lbd.reshape(by_group)
    input_LG1H = (delta_lbd * u_lbd).reshape(by_group)
    B_LGN1 = B_bgnl.flatten(0, 1).permute(2, 0, 1).contiguous().unsqueeze(3)
    C_LG1N = C_bgnl.flatten(0, 1).permute(2, 0, 1).contiguous().unsqueeze(2)

    state_GNH = torch.zeros_like(A_GNH)
    outputs: list[Tensor] = []
    for delta_G1H, input_G1H, B_GN1, C_G1N in zip(delta_LG1H, input_LG1H, B_LGN1, C_LG1N, strict=True):
        state_GNH = torch.addcmul(torch.exp(delta_G1H * A_GNH) * state_GNH, B_GN1, input_G1H)
        outputs.append(torch.bmm(C_G1N, state_GNH))
    return torch.stack(outputs).reshape(u_lbd.shape)
