"""The bidirectional block: causality of each direction, two scans in one call, initialisation, precision."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meteor.ssm.block as block_module
from meteor.errors import SettingsError
from meteor.ssm import BidirectionalScan, BidirectionalSSM, ScanIndex, scan_index, scan_sequence, selective_scan

NUM_PATCHES = 9
INNER_WIDTH = 4
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def make_scan(dtype: torch.dtype = torch.float64) -> BidirectionalScan:
    torch.manual_seed(0)
    scan = BidirectionalScan(INNER_WIDTH, state_size=3, conv_width=4, dt_rank=2, backend="auto")
    for parameter in (scan.D, scan.A_log, scan.dt_bias):
        nn.init.normal_(parameter)
    return scan.to(dtype)


def make_block(*, shared_projections: bool = True, dtype: torch.dtype = torch.float64) -> BidirectionalSSM:
    torch.manual_seed(0)
    block = BidirectionalSSM(6, inner_width=INNER_WIDTH, state_size=3, shared_projections=shared_projections)
    return block.to(dtype)


def make_indices(mode: str = "local_to_single", num_patches: int = NUM_PATCHES) -> tuple[ScanIndex, ScanIndex]:
    count = torch.tensor([num_patches])
    return scan_index(count, num_patches, mode, "forward"), scan_index(count, num_patches, mode, "backward")


def make_table(num_patches: int = NUM_PATCHES) -> Tensor:
    return torch.randn(1, 2 * num_patches + 1, INNER_WIDTH, dtype=torch.float64)


def scan_alone(scan: BidirectionalScan, rows_BLE: Tensor, direction: int) -> Tensor:
    """One direction by itself, step by step in its own visiting order, without the concatenation of channels."""
    own = slice(direction * INNER_WIDTH, (direction + 1) * INNER_WIDTH)
    rows_BEL = F.pad(rows_BLE.transpose(1, 2), (scan.conv.kernel_size[0] - 1, 0))
    u_BEL = F.silu(F.conv1d(rows_BEL, scan.conv.weight[own], scan.conv.bias[own], groups=INNER_WIDTH))
    delta_BLE, B_BLN, C_BLN = scan.selective[direction](u_BEL.transpose(1, 2))
    return selective_scan(
        u_BEL,
        delta_BLE.transpose(1, 2),
        -torch.exp(scan.A_log[own]),
        B_BLN.transpose(1, 2),
        C_BLN.transpose(1, 2),
        scan.D[own],
        delta_bias=scan.dt_bias[own],
        delta_softplus=True,
    ).transpose(1, 2)


@pytest.mark.parametrize("direction", [0, 1])
def test_two_directions_in_one_call_equal_each_direction_alone(direction: int) -> None:
    scan, table, indices = make_scan(), make_table(), make_indices()
    result_BME = scan(table, table, *indices)[direction]
    alone_BLE = scan_alone(scan, table[:, indices[direction].order[0]], direction)
    sequence = scan_sequence(NUM_PATCHES, direction=("forward", "backward")[direction])
    steps = [sequence.index(("T", patch)) for patch in range(NUM_PATCHES)] + [sequence.index(("INS", -1))]
    torch.testing.assert_close(result_BME, alone_BLE[:, steps])


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_output_of_a_direction_depends_on_rows_visited_later(direction: str) -> None:
    scan, table, indices = make_scan(), make_table(), make_indices()
    which = ("forward", "backward").index(direction)
    before_BME = scan(table, table, *indices)[which]
    sequence = scan_sequence(NUM_PATCHES, direction=direction)
    cut = sequence.index(("TL", 6))
    changed = table.clone()
    changed[:, indices[which].order[0, cut:]] += 1
    after_BME = scan(changed, changed, *indices)[which]
    earlier = [patch for kind, patch in sequence[:cut] if kind == "T"]
    later = [patch for kind, patch in sequence[cut:] if kind == "T"]
    assert earlier
    assert torch.equal(after_BME[:, earlier], before_BME[:, earlier])
    assert (after_BME[:, later] != before_BME[:, later]).any(dim=-1).all()


def test_every_output_of_the_block_depends_on_every_token() -> None:
    block = make_block()
    row_BMX = torch.randn(1, NUM_PATCHES + 1, 6, dtype=torch.float64, requires_grad=True)
    out_BMX = block(row_BMX, None, [make_indices("single")])
    for row in range(NUM_PATCHES + 1):
        (gradient_BMX,) = torch.autograd.grad(out_BMX[0, row].sum(), row_BMX, retain_graph=True)
        assert gradient_BMX.abs().sum(dim=-1).gt(0).all()


def test_a_scan_without_summaries_equals_one_whose_summaries_are_never_visited() -> None:
    block = make_block()
    row_BMX = torch.randn(1, NUM_PATCHES + 1, 6, dtype=torch.float64)
    indices = [make_indices("single")]
    unread = block(row_BMX, lambda x_BPW: torch.full_like(x_BPW, torch.nan), indices)
    torch.testing.assert_close(block(row_BMX, None, indices), unread)


def test_two_sequences_are_summed() -> None:
    block = make_block()
    row_BMX = torch.randn(1, NUM_PATCHES + 1, 6, dtype=torch.float64)
    single, pairs = make_indices("single"), make_indices("local_to_single")
    together = block(row_BMX, torch.square, [single, pairs])
    torch.testing.assert_close(together, block(row_BMX, None, [single]) + block(row_BMX, torch.square, [pairs]))


def test_separate_projections_are_the_mean_of_two_whole_blocks() -> None:
    block = make_block(shared_projections=False)
    row_BMX = torch.randn(1, NUM_PATCHES + 1, 6, dtype=torch.float64)
    index = make_indices("single")
    in_forward, in_backward, gate_forward, gate_backward = block.in_proj.weight.split(INNER_WIDTH)
    out_forward, out_backward = block.out_proj.weight.split(INNER_WIDTH, dim=1)
    shifted = [one._replace(order=one.order - NUM_PATCHES) for one in index]
    y_forward, y_backward = block.scan(row_BMX @ in_forward.T, row_BMX @ in_backward.T, *shifted)
    forward_BMX = (y_forward * F.silu(row_BMX @ gate_forward.T)) @ out_forward.T
    backward_BMX = (y_backward * F.silu(row_BMX @ gate_backward.T)) @ out_backward.T
    torch.testing.assert_close(block(row_BMX, None, [index]), (forward_BMX + backward_BMX) / 2)


def test_parameters_start_as_in_mamba() -> None:
    scan = BidirectionalScan(50, state_size=4, conv_width=4, dt_rank=3, backend="auto")
    assert torch.allclose(scan.A_log.exp(), torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(100, 4))
    assert torch.equal(scan.D, torch.ones(100))
    step = F.softplus(scan.dt_bias)
    assert step.min() >= 0.999e-3
    assert step.max() <= 0.1001
    assert step.max() / step.min() > 10
    assert scan.selective[0].dt_proj.weight.abs().max() <= 3**-0.5


def test_the_two_directions_start_with_different_weights() -> None:
    scan = make_scan()
    assert not torch.equal(scan.selective[0].x_proj.weight, scan.selective[1].x_proj.weight)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_low_precision_stays_close_to_float64_with_the_same_weights(dtype: torch.dtype) -> None:
    block = make_block(dtype=dtype)
    row_BMX = torch.randn(1, NUM_PATCHES + 1, 6, dtype=dtype)
    index = make_indices("single")
    result = block(row_BMX, None, [index])
    assert result.dtype == dtype
    truth = block.double()(row_BMX.double(), None, [index])
    torch.testing.assert_close(result.double(), truth, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_decay_skip_and_step_bias_of_a_bf16_block_are_raised_to_float32_before_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Tensor] = {}

    def record(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **rest: Any) -> Tensor:
        seen.update(A=A, D=D, delta_bias=rest["delta_bias"])
        return torch.zeros_like(u)

    monkeypatch.setattr(block_module, "selective_scan", record)
    scan = make_scan(torch.bfloat16)
    table = make_table().bfloat16()
    scan(table, table, *make_indices())
    assert {tensor.dtype for tensor in seen.values()} == {torch.float32}
    assert torch.equal(seen["A"], -scan.A_log.float().exp())


def test_an_unknown_backend_is_refused_when_the_block_is_built() -> None:
    with pytest.raises(SettingsError, match="auto, reference"):
        BidirectionalSSM(6, inner_width=4, backend="cuda_magic")
