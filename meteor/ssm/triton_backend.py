"""Triton as a scan backend; its kernels are imported only when a scan first uses them, because CPU machines lack Triton."""

from types import ModuleType

from torch import Tensor

from meteor.errors import SettingsError
from meteor.optional import import_optional


def load_triton() -> ModuleType:
    """Import the package triton.

    Raises:
        MissingPackageError: triton is absent; torch's CPU build does not install it.
    """
    return import_optional("triton", needed_for="scan_backend='triton'", install="pip install triton")


def check_triton_device(device: str, is_double: bool) -> None:
    """Refuse tensors that the kernels cannot process.

    Raises:
        SettingsError: tensors are float64, or on a CPU without Triton's interpreter (``TRITON_INTERPRET=1``).
    """
    if is_double:
        raise SettingsError("scan_backend='triton' keeps a float32 state; for float64 use scan_backend='chunked'")
    if device != "cuda" and not load_triton().knobs.runtime.interpret:
        raise SettingsError(
            f"scan_backend='triton' runs on CUDA, tensors are on {device!r}: use scan_backend='auto' or 'chunked', or set "
            "TRITON_INTERPRET=1 before starting, to run its kernels slowly in Python"
        )


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
    """Import and call `meteor.ssm.triton_scan.selective_scan_triton`."""
    from meteor.ssm import triton_scan

    return triton_scan.selective_scan_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
