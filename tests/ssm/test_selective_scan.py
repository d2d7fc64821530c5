"""The selective scan against a triple loop over numbers, its dtypes, its gradients, its errors."""

import math
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meteor.errors import MissingPackageError, SettingsError
from meteor.ssm import backends, chunked, mamba, resolve_backend, selective_scan
from meteor.ssm.chunked import CHUNK_STEPS

# Largest error of outputs and gradients, relative to the largest value of each, after inputs were rounded to the dtype.
# The state is float32 for all but float64; half precision rounds what goes in and comes out of the backward pass.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Where a test can run the kernels of others: mamba_ssm needs CUDA.
TESTED = [
    "reference",
    "chunked",
    pytest.param("triton", marks=pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")),
]


def make_inputs(
    *,
    num_sequences: int = 2,
    width: int = 6,
    num_steps: int = 7,
    num_states: int = 3,
    num_groups: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    groups = () if num_groups is None else (num_groups,)
    return {
        "u": draw(num_sequences, width, num_steps),
        "delta": draw(num_sequences, width, num_steps),
        "A": -draw(width, num_states).exp(),
        "B": draw(num_sequences, *groups, num_states, num_steps),
        "C": draw(num_sequences, *groups, num_states, num_steps),
        "D": draw(width),
        "z": draw(num_sequences, width, num_steps),
        "delta_bias": draw(width),
    }


def make_truth(inputs: dict[str, Tensor], *, delta_softplus: bool) -> Tensor:
    """One number at a time, from the definition."""
    given = {name: tensor.double().tolist() for name, tensor in inputs.items()}
    grouped = inputs["B"].dim() == 4
    num_groups = inputs["B"].shape[1] if grouped else 1
    num_sequences, width, num_steps = inputs["u"].shape
    result = torch.zeros(num_sequences, width, num_steps, dtype=torch.float64)
    for b in range(num_sequences):
        for d in range(width):
            group = d // (width // num_groups)
            B = given["B"][b][group] if grouped else given["B"][b]
            C = given["C"][b][group] if grouped else given["C"][b]
            state = [0.0] * len(given["A"][d])
            for step in range(num_steps):
                u = given["u"][b][d][step]
                delta = given["delta"][b][d][step] + (given["delta_bias"][d] if "delta_bias" in given else 0.0)
                delta = math.log1p(math.exp(delta)) if delta_softplus else delta
                y = 0.0
                for n, a in enumerate(given["A"][d]):
                    state[n] = math.exp(delta * a) * state[n] + delta * B[n][step] * u
                    y += C[n][step] * state[n]
                y += given["D"][d] * u if "D" in given else 0.0
                z = given["z"][b][d][step] if "z" in given else None
                result[b, d, step] = y if z is None else y * z / (1 + math.exp(-z))
    return result


def require_close(results: list[Tensor], truths: list[Tensor], tolerance: float) -> None:
    for result, truth in zip(results, truths, strict=True):
        largest = max(truth.double().abs().max().item(), 1e-30) if truth.numel() else 1.0
        torch.testing.assert_close(result.double(), truth.double(), rtol=0, atol=tolerance * largest)


def outputs_and_gradients(inputs: dict[str, Tensor], backend: str, *, delta_softplus: bool = True) -> list[Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    result = selective_scan(**leaves, delta_softplus=delta_softplus, backend=backend)
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((result * weight.to(result.dtype)).sum(), list(leaves.values()))
    assert all(gradient.dtype == inputs[name].dtype for name, gradient in zip(inputs, gradients, strict=True))
    return [result.detach(), *gradients]


def require_parity(inputs: dict[str, Tensor], backend: str, *, delta_softplus: bool = True) -> None:
    """Outputs and all gradients are those of the reference in float64 on the same (rounded) inputs."""
    dtype = inputs["u"].dtype
    truth_inputs = {name: tensor.double() for name, tensor in inputs.items()}
    truths = outputs_and_gradients(truth_inputs, "reference", delta_softplus=delta_softplus)
    results = outputs_and_gradients(inputs, backend, delta_softplus=delta_softplus)
    assert all(result.isfinite().all() for result in results)
    require_close(results, truths, TOLERANCES[dtype])


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_groups", [None, 1, 2, 3])
def test_the_scan_equals_a_loop_over_single_numbers(backend: str, dtype: torch.dtype, num_groups: int | None) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("it keeps a float32 state, and says so")
    inputs = make_inputs(num_groups=num_groups, dtype=dtype)
    result = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert result.dtype == dtype
    require_close([result], [make_truth(inputs, delta_softplus=True)], TOLERANCES[dtype])


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_steps", [1, 7, 16, 35])
def test_outputs_and_all_gradients_equal_the_reference(backend: str, dtype: torch.dtype, num_steps: int) -> None:
    require_parity(make_inputs(num_steps=num_steps, num_groups=2, dtype=dtype), backend)


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("shift", [-30.0, 5.0, 30.0])
def test_steps_too_small_to_see_and_large_ones_give_no_nan(backend: str, shift: float) -> None:
    # softplus(30) times A of up to -20: decays of exp(-600), and in chunks products of many.
    inputs = make_inputs(num_steps=20, dtype=torch.float32)
    inputs["delta"] = inputs["delta"] + shift
    inputs["A"] = inputs["A"] * 4
    require_parity(inputs, backend)


@pytest.mark.parametrize("backend", TESTED)
def test_steps_of_size_zero_have_finite_gradients(backend: str) -> None:
    inputs = make_inputs(num_steps=19, num_groups=2, dtype=torch.float32)
    del inputs["delta_bias"]
    inputs["delta"] = inputs["delta"].abs()
    inputs["delta"][..., 3:9] = 0
    require_parity(inputs, backend, delta_softplus=False)


@settings(deadline=None, max_examples=40)
@given(
    num_sequences=st.integers(0, 3),
    channels=st.integers(1, 5),
    num_groups=st.integers(1, 3),
    num_steps=st.integers(1, 70),
    num_states=st.integers(1, 5),
)
def test_the_chunked_scan_equals_the_reference_at_any_shape(
    num_sequences: int, channels: int, num_groups: int, num_steps: int, num_states: int
) -> None:
    inputs = make_inputs(
        num_sequences=num_sequences,
        width=channels * num_groups,
        num_steps=num_steps,
        num_states=num_states,
        num_groups=num_groups,
    )
    require_parity(inputs, "chunked")


@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
@settings(deadline=None, max_examples=8)
@given(
    num_sequences=st.integers(0, 2),
    channels=st.sampled_from([1, 3, 33]),
    num_groups=st.integers(1, 2),
    num_steps=st.integers(1, 10),
    num_states=st.integers(1, 17),
)
def test_the_triton_scan_equals_the_reference_at_any_shape(
    num_sequences: int, channels: int, num_groups: int, num_steps: int, num_states: int
) -> None:
    inputs = make_inputs(
        num_sequences=num_sequences,
        width=channels * num_groups,
        num_steps=num_steps,
        num_states=num_states,
        num_groups=num_groups,
        dtype=torch.float32,
    )
    require_parity(inputs, "triton")


def test_the_chunked_scan_keeps_one_state_a_chunk_for_the_backward_pass() -> None:
    inputs = make_inputs(num_sequences=1, width=8, num_steps=160, num_states=16, dtype=torch.float32)
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        selective_scan(**leaves, delta_softplus=True, backend="chunked")
    all_states = 8 * 16 * 160
    # Sixteen steps a chunk; what else is kept has no state dimension.
    assert kept < all_states / CHUNK_STEPS + 12 * sum(tensor.numel() for tensor in inputs.values())
    assert kept < all_states


@pytest.mark.parametrize("backend", TESTED)
def test_a_scan_of_many_blocks_and_chunks_equals_the_reference(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        pytest.skip("it has no blocks of sequences")
    monkeypatch.setattr(chunked, "_BLOCK_ELEMENTS", 20)
    require_parity(make_inputs(num_sequences=5, num_steps=40, num_groups=2, dtype=torch.float32), backend)


@pytest.mark.parametrize("absent", [{"D"}, {"z"}, {"delta_bias"}, {"D", "z", "delta_bias"}])
@pytest.mark.parametrize("delta_softplus", [False, True])
def test_what_is_not_given_is_left_out(absent: set[str], delta_softplus: bool) -> None:
    inputs = {name: tensor for name, tensor in make_inputs().items() if name not in absent}
    inputs["delta"] = inputs["delta"].abs()
    result = selective_scan(**inputs, delta_softplus=delta_softplus)
    torch.testing.assert_close(result, make_truth(inputs, delta_softplus=delta_softplus))


def test_a_single_step_is_a_scan_too() -> None:
    inputs = make_inputs(num_steps=1, num_groups=2)
    torch.testing.assert_close(selective_scan(**inputs, delta_softplus=True), make_truth(inputs, delta_softplus=True))


def test_an_empty_batch_gives_an_empty_result() -> None:
    assert selective_scan(**make_inputs(num_sequences=0)).shape == (0, 6, 7)


def test_a_step_of_size_zero_leaves_the_state_as_it_is() -> None:
    inputs = make_inputs()
    del inputs["delta_bias"]
    inputs["delta"] = inputs["delta"].abs()
    inputs["delta"][..., 3] = 0
    kept = [0, 1, 2, 4, 5, 6]
    without = {name: tensor if name in "AD" else tensor[..., kept] for name, tensor in inputs.items()}
    torch.testing.assert_close(selective_scan(**inputs)[..., kept], selective_scan(**without))


def test_half_precision_inputs_are_scanned_in_float32() -> None:
    # 2000 steps of +1e-3 on a state near 1: bf16 would stop counting at once.
    num_steps = 2000
    ones = torch.ones(1, 1, num_steps, dtype=torch.bfloat16)
    result = selective_scan(ones, ones * 1e-3, torch.zeros(1, 1), ones, ones)
    assert abs(result[0, 0, -1].item() - num_steps * 1e-3) < 0.02


def test_autocast_does_not_lower_the_precision_of_the_scan() -> None:
    inputs = make_inputs(dtype=torch.float32)
    expected = selective_scan(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selective_scan(**inputs), expected)


@pytest.mark.parametrize("num_groups", [None, 2])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_of_every_input_equal_finite_differences(backend: str, num_groups: int | None) -> None:
    inputs = make_inputs(width=2, num_steps=19, num_states=2, num_groups=num_groups)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def scan(*tensors: Tensor) -> Tensor:
        return selective_scan(*tensors, delta_softplus=True, backend=backend)

    assert torch.autograd.gradcheck(scan, leaves)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"'cuda_magic'.*auto, reference, chunked, triton, mamba_ssm"):
        selective_scan(**make_inputs(), backend="cuda_magic")


def test_auto_takes_the_chunked_scan_on_a_cpu_and_says_once_which_and_why(caplog: pytest.LogCaptureFixture) -> None:
    backends._choose.cache_clear()
    inputs = make_inputs()
    with caplog.at_level("INFO", logger="meteor.ssm"):
        for _ in range(3):
            assert torch.equal(selective_scan(**inputs), selective_scan(**inputs, backend="chunked"))
    assert [record.getMessage() for record in caplog.records] == ["scan backend: chunked, since tensors are on 'cpu'"]


@pytest.mark.parametrize(
    ("installed", "is_double", "expected"),
    [
        ({"triton", "selective_scan_cuda"}, False, "triton"),
        ({"selective_scan_cuda"}, False, "mamba_ssm"),
        (set(), False, "chunked"),
        ({"triton"}, True, "chunked"),
    ],
)
def test_auto_on_cuda_takes_what_is_installed(
    installed: set[str], is_double: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends._choose.cache_clear()
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name in installed or None)
    assert backends._choose("cuda", is_double) == expected
    backends._choose.cache_clear()


@pytest.mark.parametrize(("backend", "module"), [("mamba_ssm", "mamba_ssm"), ("triton", "triton")])
def test_a_backend_that_is_named_and_absent_is_an_error_with_the_install_line(
    backend: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match="pip install"):
        selective_scan(**make_inputs(), backend=backend)


def test_the_triton_backend_refuses_float64() -> None:
    with pytest.raises(SettingsError, match=r"float64.*chunked"):
        resolve_backend("triton", torch.zeros(1, dtype=torch.float64))


def test_mambas_kernel_gets_what_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(num_groups=2, dtype=torch.float32)
    seen: list[Any] = []

    class FakeMamba:
        @staticmethod
        def selective_scan_fn(*arguments: Any) -> Tensor:
            seen.extend(arguments)
            return arguments[0]

    class FakeCuda:
        """A tensor that says it is on CUDA."""

        device = torch.device("cuda")
        dtype = torch.bfloat16

        @staticmethod
        def element_size() -> int:
            return 2

    monkeypatch.setattr(mamba, "load_mamba", lambda: FakeMamba)
    names = ["delta", "A", "B", "C", "D", "z", "delta_bias"]
    mamba.selective_scan_mamba(FakeCuda(), *(inputs[name].double() for name in names), True)  # type: ignore[arg-type]
    dtypes = [argument.dtype for argument in seen[1:-1]]
    half, full = torch.bfloat16, torch.float32
    assert dtypes == [half, full, half, half, full, half, full]
    assert seen[-1] is True
    with pytest.raises(SettingsError, match="CUDA"):
        mamba.selective_scan_mamba(inputs["u"], *(inputs[name] for name in names), True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 6)}, "u must be"),
        ({"delta": torch.zeros(2, 6, 8)}, "delta is"),
        ({"A": torch.zeros(5, 3)}, "A is"),
        ({"B": torch.zeros(6, 3)}, "B is"),
        ({"B": torch.zeros(2, 4, 3, 7)}, "4 groups"),
        ({"C": torch.zeros(2, 2, 3, 7)}, "C is"),
        ({"D": torch.zeros(5)}, "D is"),
        ({"z": torch.zeros(2, 6, 8)}, "z is"),
        ({"delta_bias": torch.zeros(6, 1)}, "delta_bias is"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**make_inputs() | change)


def test_a_sequence_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no steps"):
        selective_scan(**make_inputs(num_steps=0))
