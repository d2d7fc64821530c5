"""CUDA kernel of the package mamba-ssm as a scan backend; no other file imports the package."""

from types import ModuleType

from torch import Tensor

from meteor.errors import SettingsError
from meteor.optional import import_optional


def load_mamba() -> ModuleType:
    """Import the module that holds mamba-ssm's kernel.

    Raises:
        MissingPackageError: mamba-ssm, or its compiled CUDA extension, is absent.
    """
    return import_optional(
        "mamba_ssm.ops.selective_scan_interface",
        needed_for="scan_backend='mamba_ssm'",
        install="pip install 'llava-meteor[mamba]' --no-build-isolation (on a machine with a CUDA compiler)",
    )


def selective_scan_mamba(
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
    """Run mamba-ssm's ``selective_scan_fn``; see `meteor.ssm.selective_scan`. B and C have groups, (b, g, n, l).

    Raises:
        SettingsError: tensors are not on a CUDA device, or are float64.
        MissingPackageError: mamba-ssm is absent.
    """
    mamba = load_mamba()
    if u.device.type != "cuda" or u.element_size() > 4:
        raise SettingsError(
            f"scan_backend='mamba_ssm' takes float32, bfloat16 and float16 on CUDA; u is {u.dtype} on {u.device}. "
            "Use scan_backend='chunked' there"
        )
    # The kernel requires one dtype for all tensors that vary along the sequence, and float32 for the others.
    delta, B, C = (tensor.to(u.dtype) for tensor in (delta, B, C))
    D, delta_bias = (None if vector is None else vector.float() for vector in (D, delta_bias))
    z = None if z is None else z.to(u.dtype)
    return mamba.selective_scan_fn(u, delta, A.float(), B, C, D, z, delta_bias, delta_softplus)
