"""Entry point of the selective scan: shapes are checked, and a backend is chosen and called."""

import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from meteor.errors import SettingsError
from meteor.ssm.chunked import selective_scan_chunked
from meteor.ssm.mamba import load_mamba, selective_scan_mamba
from meteor.ssm.reference import selective_scan_reference
from meteor.ssm.triton_backend import check_triton_device, load_triton, selective_scan_triton

_LOG = logging.getLogger(__name__)

ScanFunction = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, bool], Tensor
]

BACKENDS: dict[str, ScanFunction] = {
    "reference": selective_scan_reference,
    "chunked": selective_scan_chunked,
    "triton": selective_scan_triton,
    "mamba_ssm": selective_scan_mamba,
}
# Backends that need an optional package, with the function that imports it or raises MissingPackageError.
_LOADERS: dict[str, Callable[[], object]] = {"triton": load_triton, "mamba_ssm": load_mamba}


def check_backend(name: str) -> None:
    """Refuse a backend that does not exist or whose package is absent; ``"auto"`` always passes.

    Raises:
        SettingsError: the backend does not exist.
        MissingPackageError: the backend's package is absent; the message contains the install line.
    """
    if name != "auto" and name not in BACKENDS:
        raise SettingsError(f"There is no scan backend {name!r}; choose one of: {', '.join(['auto', *BACKENDS])}.")
    if name in _LOADERS:
        _LOADERS[name]()


def resolve_backend(name: str, tensor: Tensor) -> str:
    """Turn ``"auto"`` into the backend for a tensor's device and dtype; check and return other names.

    On CUDA ``"auto"`` prefers ``triton``, then ``mamba_ssm``, if they are installed. On other devices, and for float64, it
    means ``chunked``. Each choice is logged once, with its reason.

    Raises:
        SettingsError: the backend does not exist, or does not support the device or dtype.
        MissingPackageError: the backend's package is absent.
    """
    return _resolve(name, tensor.device.type, tensor.dtype == torch.float64)


# torch.compile takes the result as a constant: neither the search for packages nor the log line belongs in a graph.
@torch.compiler.assume_constant_result
def _resolve(name: str, device: str, is_double: bool) -> str:
    resolved = _choose(device, is_double) if name == "auto" else name
    check_backend(resolved)
    if resolved == "triton":
        check_triton_device(device, is_double)
    return resolved


@lru_cache
def _choose(device: str, is_double: bool) -> str:
    if device != "cuda":
        name, reason = "chunked", f"tensors are on {device!r}"
    elif is_double:
        name, reason = "chunked", "the CUDA kernels keep a float32 state, and tensors are float64"
    elif importlib.util.find_spec("triton"):
        name, reason = "triton", "tensors are on CUDA"
    elif importlib.util.find_spec("selective_scan_cuda"):
        name, reason = "mamba_ssm", "tensors are on CUDA, and triton is not installed"
    else:
        name, reason = "chunked", "neither triton nor mamba_ssm is installed; `pip install triton` is much faster"
    _LOG.info("scan backend: %s, since %s", name, reason)
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

    With delta' = softplus(delta + delta_bias), for each channel d and state n:
    h_l = exp(delta'_l A) h_{l-1} + delta'_l B_l u_l and y_l = (sum_n C_l h_l + D u_l) * silu(z_l).
    The state is kept in float32 (float64 for float64 inputs), even under autocast.

    Args:
        u: input, (b, d, l).
        delta: step size, (b, d, l); a step of 0 after bias and softplus leaves the state unchanged.
        A: state matrix, (d, n), real, usually negative.
        B: input matrix, (b, n, l); or (b, g, n, l) if the channels come in g consecutive groups of d / g.
        C: output matrix, with the shape of B.
        D: skip connection, (d,).
        z: gate, (b, d, l).
        delta_bias: bias added to delta, (d,).
        delta_softplus: whether delta goes through softplus.
        backend: ``"auto"``, ``"reference"`` (the readable truth), ``"chunked"`` (plain torch, any device), ``"triton"``
            (this project's CUDA kernels) or ``"mamba_ssm"`` (the package's CUDA kernel).

    Returns:
        The output y, (b, d, l), in the dtype of ``u``; not necessarily contiguous.

    Raises:
        SettingsError: the backend does not exist, or does not take these tensors.
        MissingPackageError: the backend's package is absent.
        ValueError: shapes do not fit together, or l is 0.
    """
    backend = resolve_backend(backend, u)
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)
    if B.dim() == 3:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    # Autocast would run the scan's matrix products in half precision, but the state must stay in float32.
    with torch.autocast(u.device.type, enabled=False):
        return BACKENDS[backend](u, delta, A, B, C, D, z, delta_bias, delta_softplus)


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
