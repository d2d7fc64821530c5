"""The scan and the block on a CUDA device, at sizes of training, against float64 on the same device."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from meteor.projector import build_projector
from meteor.ssm import BidirectionalSSM, scan_order, selective_scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]
# Largest difference over the largest value of the truth, after inputs were rounded.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BACKENDS = [
    "chunked",
    "triton",
    pytest.param(
        "mamba_ssm", marks=pytest.mark.skipif(not find_spec("selective_scan_cuda"), reason="mamba_ssm is not installed")
    ),
]
GRIDS = [(24, 24), (18, 30), (32, 16), (1, 1), (7, 5)]


def require_close(results: dict[str, Tensor], truths: dict[str, Tensor], tolerance: float) -> None:
    for name, truth in truths.items():
        largest = truth.abs().max().item()
        torch.testing.assert_close(
            results[name].double(), truth, rtol=0, atol=tolerance * largest, msg=lambda text, n=name: f"{n}: {text}"
        )


def scan(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    result = selective_scan(**leaves, delta_softplus=True, backend=backend)
    weight = torch.randn(result.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    (result * weight).sum().backward()
    return {"y": result.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_steps", [1, 200, 1153])
def test_outputs_and_all_gradients_equal_those_in_float64(backend: str, dtype: torch.dtype, num_steps: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    inputs = {
        "u": draw(3, 192, num_steps),
        "delta": draw(3, 192, num_steps) - 3,
        # The CUDA kernel of mamba_ssm takes these three in float32 alone.
        "A": -(draw(192, 16).float().exp()),
        "B": draw(3, 2, 16, num_steps),
        "C": draw(3, 2, 16, num_steps),
        "D": draw(192).float(),
        "delta_bias": draw(192).float(),
    }
    require_close(
        scan(inputs, backend), scan({name: one.double() for name, one in inputs.items()}, "chunked"), TOLERANCES[dtype]
    )


def run_block(block: BidirectionalSSM, row_BMX: Tensor, backend: str) -> dict[str, Tensor]:
    block = copy.deepcopy(block)
    block.scan.backend = backend
    grids = torch.tensor(GRIDS, device="cuda")
    max_patches, leaf_BMX = row_BMX.shape[1] - 1, row_BMX.clone().requires_grad_()
    result_BMX = block(leaf_BMX, grids, [scan_order(grids.prod(dim=1), max_patches, "local_to_single")])
    real_BM1 = (torch.arange(max_patches + 1, device="cuda") < grids.prod(dim=1, keepdim=True)).unsqueeze(-1)
    real_BM1[:, max_patches] = True
    weight = torch.randn(result_BMX.shape, generator=torch.Generator("cuda").manual_seed(4), device="cuda") * real_BM1
    (result_BMX * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    return {"result": (result_BMX * real_BM1).detach(), "rows": leaf_BMX.grad, **gradients}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("window", [3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_block_equals_plain_torch_in_float64(shared: bool, window: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = BidirectionalSSM(256, inner_width=160, shared_projections=shared, window=window).cuda().to(dtype)
    max_patches = max(rows * columns for rows, columns in GRIDS)
    row_BMX = torch.randn(len(GRIDS), max_patches + 1, 256, device="cuda").to(dtype)
    fused = run_block(block, row_BMX, "triton")
    assert all(one.isfinite().all() for one in fused.values())
    require_close(fused, run_block(block.double(), row_BMX.double(), "chunked"), TOLERANCES[dtype])
    # Sums have one order: a run can be repeated bit for bit.
    again = run_block(block.to(dtype), row_BMX, "triton")
    assert all(torch.equal(one, again[name]) for name, one in fused.items())


def test_the_compiled_projector_gives_the_numbers_of_the_eager_one() -> None:
    torch.manual_seed(0)
    projector = build_projector("meteor", vision_width=256, llm_width=320, k=32).cuda()
    compiled = torch.compile(projector, fullgraph=True)
    for grids in (GRIDS, GRIDS[1:], GRIDS[:2]):
        max_patches = max(rows * columns for rows, columns in grids)
        features = torch.randn(len(grids), max_patches, 256, device="cuda")
        attention, sizes = torch.rand(len(grids), max_patches, device="cuda"), torch.tensor(grids, device="cuda")
        results = []
        for run in (projector, compiled):
            output = run(features, attention, sizes)
            gradients = torch.autograd.grad(output.tokens.square().sum(), list(projector.parameters()))
            results.append({"tokens": output.tokens.detach(), **dict(enumerate(gradients))})
        require_close(results[1], {name: one.double() for name, one in results[0].items()}, 1e-3)
