"""The one entry to the selective scan: checks shapes, then hands over to a backend from a table."""

from collections.abc import Callable

import torch
from torch import Tensor

from meteor.errors import SettingsError
from meteor.ssm.reference import selective_scan_reference

ScanFunction = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, bool], Tensor
]

BACKENDS: dict[str, ScanFunction] = {"reference": selective_scan_reference}


def resolve_backend(name: str) -> str:
    """Turn a backend's name, or ``"auto"``, into the name of a backend that exists.

    Raises:
        SettingsError: no such backend.
    """
    if name == "auto":
        return "reference"
    if name not in BACKENDS:
        raise SettingsError(f"There is no scan backend {name!r}; choose one of: {', '.join(['auto', *BACKENDS])}.")
    return name


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Scan a sequence with input-dependent dynamics (S6; Mamba, arXiv 2312.00752, algorithm 2).

    With delta' = softplus(delta + delta_bias), per channel d and state n:
    h_l = exp(delta'_l A) h_{l-1} + delta'_l B_l u_l and y_l = (sum_n C_l h_l + D u_l) * silu(z_l).
    The state is kept in float32 (float64 for float64 inputs), under autocast too.

    Args:
        u: (b, d, l), input.
        delta: (b, d, l), step size; 0 after bias and softplus leaves the state as it is.
        A: (d, n), real, usually negative.
        B: (b, n, l), or (b, g, n, l) with d divisible by g: channels come in g groups of d / g, one after the other.
        C: as B.
        D: (d,), skip connection.
        z: (b, d, l), gate.
        delta_bias: (d,).
        delta_softplus: whether delta goes through softplus.
        backend: ``"auto"`` or a name from `BACKENDS`.

    Returns:
        (b, d, l) in the dtype of ``u``; not necessarily contiguous.

    Raises:
        SettingsError: no such backend.
        ValueError: shapes do not fit together, or l is 0.
    """
    scan = BACKENDS[resolve_backend(backend)]
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)
    # Autocast would run the matrix products of the scan in half precision.
    with torch.autocast(u.device.type, enabled=False):
        return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _check_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f"u must be (b, d, l) and A (d, n); they are {tuple(u.shape)} and {tuple(A.shape)}.")
    num_sequences, width, num_steps = u.shape
    num_states = A.shape[1]
    if num_steps == 0:
        raise ValueError("u has no steps (l = 0); a scan needs at least one.")
    num_groups = B.shape[1] if B.dim() == 4 else 1
    if num_groups == 0 or width % num_groups:
        raise ValueError(f"The {width} channels of u do not divide into the {num_groups} groups of B.")
    groups = (num_groups,) if B.dim() == 4 else ()
    matrix_shape = (num_sequences, *groups, num_states, num_steps)
    expected = {
        "delta": (delta, tuple(u.shape)),
        "A": (A, (width, num_states)),
        "B": (B, matrix_shape),
        "C": (C, matrix_shape),
        "D": (D, (width,)),
        "z": (z, tuple(u.shape)),
        "delta_bias": (delta_bias, (width,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; with u {tuple(u.shape)} it must be {shape}.")
