"""The selective scan against a triple loop over numbers, its dtypes, its gradients, its errors."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from meteor.errors import SettingsError
from meteor.ssm import BACKENDS, selective_scan

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_groups", [None, 1, 2, 3])
def test_the_scan_equals_a_loop_over_single_numbers(backend: str, dtype: torch.dtype, num_groups: int | None) -> None:
    inputs = make_inputs(num_groups=num_groups, dtype=dtype)
    result = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert result.dtype == dtype
    truth = make_truth(inputs, delta_softplus=True)
    torch.testing.assert_close(result.double(), truth, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


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
def test_gradients_of_every_input_equal_finite_differences(num_groups: int | None) -> None:
    inputs = make_inputs(width=2, num_steps=3, num_states=2, num_groups=num_groups)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def scan(*tensors: Tensor) -> Tensor:
        return selective_scan(*tensors, delta_softplus=True)

    assert torch.autograd.gradcheck(scan, leaves)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"'cuda_magic'.*auto, reference"):
        selective_scan(**make_inputs(), backend="cuda_magic")


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
