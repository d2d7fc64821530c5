"""The block on Triton's kernels against the block in plain torch, and the kernels through Triton's compiler."""

import copy
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from meteor.ssm import BidirectionalSSM, scan_order

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")

GRIDS = ((2, 3), (1, 2), (1, 1))
MAX_PATCHES = 7
# Relative to the largest value of each tensor; bfloat16 rounds between every two operations of the plain block.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
LAYOUTS = [
    ({}, ("local_to_single",)),
    ({"window": 5}, ("single", "local_to_single")),
    ({"local": "conv"}, ("local_to_single",)),
    ({"shared_projections": False}, ("local_to_single",)),
    ({"shared_projections": False, "window": None}, ("single",)),
]

# Not interpreted, but through the whole compiler to code for the GPU; no GPU is needed for that.
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from meteor.ssm.triton_scan_kernels import scan_backward, scan_forward
from meteor.ssm.triton_visit_kernels import rows_backward, visit_backward, visit_forward

FLOAT32 = {"a_ptr", "d_ptr", "bias_ptr", "starts_ptr", "da_ptr", "db_ptr", "dc_ptr", "dd_ptr", "dbias_ptr", "dweight_ptr"}
INTEGERS = {"rows_ptr", "num_steps_ptr", "order_ptr", "grids_ptr"}
scan = {"HAS_D": True, "HAS_BIAS": True, "SOFTPLUS": True, "BY_ROWS": True, "CHUNK": 8, "STATES": 16, "BLOCK": 32}
visit = {"HALF": 1, "SEGMENT": 128, "BLOCK": 128}
kernels = [(scan_forward, scan, 1), (scan_backward, scan, 1), (visit_forward, visit, 2), (visit_backward, visit, 2)]
kernels += [(rows_backward, {"HALF": 1, "SHARED": shared, "BLOCK": 128}, 2) for shared in (True, False)]

def type_of(name, constants):
    if name in constants:
        return "constexpr"
    if not name.endswith("_ptr"):
        return "i32"
    return "*fp32" if name in FLOAT32 else "*i32" if name in INTEGERS else "*bf16"

for kernel, constants, num_warps in kernels:
    signature = {name: type_of(name, constants) for name in kernel.arg_names}
    code = triton.compile(
        ASTSource(kernel, signature, constexprs=constants),
        target=GPUTarget("cuda", int(sys.argv[1]), 32),
        options={"num_warps": num_warps},
    )
    assert code.asm["cubin"], kernel
"""


def outputs_and_gradients(
    block: BidirectionalSSM, backend: str, row_BMX: Tensor, modes: tuple[str, ...]
) -> dict[str, Tensor]:
    block = copy.deepcopy(block)
    block.scan.backend = backend
    grids = torch.tensor(GRIDS)
    num_patches_B = grids.prod(dim=1)
    leaf_BMX = row_BMX.clone().requires_grad_()
    result_BMX = block(leaf_BMX, grids, [scan_order(num_patches_B, MAX_PATCHES, mode) for mode in modes])
    assert result_BMX.isfinite().all()
    real_BM = torch.arange(MAX_PATCHES + 1) < num_patches_B.unsqueeze(1)
    real_BM[:, MAX_PATCHES] = True
    weight = torch.randn(result_BMX.shape, generator=torch.Generator().manual_seed(4)) * real_BM.unsqueeze(-1)
    (result_BMX.float() * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    assert not leaf_BMX.grad[~real_BM].any()
    return {"result": result_BMX[real_BM].detach(), "rows": leaf_BMX.grad, **gradients}


@pytest.mark.parametrize(("settings", "modes"), LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_fused_kernels_give_the_numbers_and_gradients_of_plain_torch(
    settings: dict[str, Any], modes: tuple[str, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    block = BidirectionalSSM(6, **{"inner_width": 5, "state_size": 3, "window": 3, **settings})
    for parameter in (block.scan.D, block.scan.A_log, block.scan.dt_bias):
        torch.nn.init.normal_(parameter)
    row_BMX = torch.randn(len(GRIDS), MAX_PATCHES + 1, 6)
    block, row_BMX = block.to(dtype), row_BMX.to(dtype)
    fused = outputs_and_gradients(block, "triton", row_BMX, modes)
    plain = outputs_and_gradients(block.float(), "chunked", row_BMX.float(), modes)
    for name, truth in plain.items():
        assert fused[name].dtype == dtype
        largest = truth.abs().max().item()
        torch.testing.assert_close(
            fused[name].float(),
            truth,
            rtol=0,
            atol=TOLERANCES[dtype] * largest,
            msg=lambda text, n=name: f"{n}: {text}",
        )


def test_an_empty_batch_goes_through_the_fused_kernels() -> None:
    block = BidirectionalSSM(6, inner_width=5, state_size=3, window=3, backend="triton")
    order = scan_order(torch.zeros(0, dtype=torch.long), MAX_PATCHES, "local_to_single")
    result = block(torch.zeros(0, MAX_PATCHES + 1, 6), torch.zeros(0, 2, dtype=torch.long), [order])
    assert result.shape == (0, MAX_PATCHES + 1, 6)
    result.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in block.parameters())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is Linux's")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_to_code_for_a_gpu(capability: int, tmp_path: Any) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
