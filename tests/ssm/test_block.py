"""The bidirectional block: causality of each direction, two scans in one call, initialisation, precision."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meteor.ssm.block as block_module
from meteor.errors import SettingsError
from meteor.ssm import BidirectionalScan, BidirectionalSSM, ScanOrder, scan_order, scan_sequence, selective_scan
from meteor.ssm.windows import WindowMean

GRID = (3, 3)
NUM_PATCHES = 9
INNER_WIDTH = 4
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


class Squares(nn.Module):
    """A local summary that needs no map."""

    def forward(self, token_BPX: Tensor, maps: object) -> Tensor:
        return token_BPX.square()


def make_scan(
    dtype: torch.dtype = torch.float64, *, local: nn.Module | None = None, backend: str = "auto"
) -> BidirectionalScan:
    torch.manual_seed(0)
    scan = BidirectionalScan(INNER_WIDTH, state_size=3, dt_rank=2, local=local or Squares(), backend=backend)
    for parameter in (scan.D, scan.A_log, scan.dt_bias):
        nn.init.normal_(parameter)
    return scan.to(dtype)


def make_block(*, dtype: torch.dtype = torch.float64, **settings: Any) -> BidirectionalSSM:
    torch.manual_seed(0)
    return BidirectionalSSM(6, inner_width=INNER_WIDTH, state_size=3, **settings).to(dtype)


def make_order(mode: str = "local_to_single", num_patches: int = NUM_PATCHES) -> ScanOrder:
    return scan_order(torch.tensor([num_patches]), num_patches, mode)


def make_rows(width: int = INNER_WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, NUM_PATCHES + 1, width, generator=generator, dtype=torch.float64)


def run(scan: nn.Module, row_BMX: Tensor, order: Any) -> Tensor:
    return scan(row_BMX, torch.tensor([GRID]).expand(len(row_BMX), 2), order)


def scan_alone(scan: BidirectionalScan, rows_BLE: Tensor, direction: int) -> Tensor:
    """One direction by itself, step by step in its own visiting order, without the concatenation of channels."""
    own = slice(direction * INNER_WIDTH, (direction + 1) * INNER_WIDTH)
    rows_BEL = F.pad(rows_BLE.transpose(1, 2), (3, 0))
    u_BEL = F.silu(F.conv1d(rows_BEL, scan.conv.weight[own], scan.conv.bias[own], groups=INNER_WIDTH))
    dt_BLR, B_BLN, C_BLN = F.linear(u_BEL.transpose(1, 2), scan.x_proj[direction]).split(scan.sizes, dim=-1)
    return selective_scan(
        u_BEL,
        F.linear(dt_BLR, scan.dt_proj[direction]).transpose(1, 2),
        -torch.exp(scan.A_log[own]),
        B_BLN.transpose(1, 2),
        C_BLN.transpose(1, 2),
        scan.D[own],
        delta_bias=scan.dt_bias[own],
        delta_softplus=True,
        backend="reference",
    ).transpose(1, 2)


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("mode", ["single", "local_to_single"])
def test_two_directions_in_one_call_equal_each_direction_alone(mode: str, direction: int) -> None:
    scan, rows, order = make_scan(), make_rows(), make_order(mode)
    table = torch.cat([rows[:, :-1].square(), rows], dim=1)
    result_BME = run(scan, rows, order)[:, :, direction]
    alone_BLE = scan_alone(scan, table[:, order.rows[0, direction]], direction)
    sequence = scan_sequence(NUM_PATCHES, mode=mode, direction=("forward", "backward")[direction])
    steps = [sequence.index(("T", patch)) for patch in range(NUM_PATCHES)] + [sequence.index(("INS", -1))]
    torch.testing.assert_close(result_BME, alone_BLE[:, steps])


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_output_of_a_direction_depends_on_tokens_visited_later(direction: str) -> None:
    scan, rows, order = make_scan(), make_rows(), make_order()
    which = ("forward", "backward").index(direction)
    before_BME = run(scan, rows, order)[:, :, which]
    sequence = scan_sequence(NUM_PATCHES, direction=direction)
    cut = sequence.index(("TL", 6))
    later = [patch for kind, patch in sequence[cut:] if kind == "T"]
    earlier = [patch for kind, patch in sequence[:cut] if kind == "T"]
    changed = rows.clone()
    changed[:, later] += 1
    after_BME = run(scan, changed, order)[:, :, which]
    assert earlier
    assert torch.equal(after_BME[:, earlier], before_BME[:, earlier])
    assert (after_BME[:, later] != before_BME[:, later]).any(dim=-1).all()


def test_every_output_of_the_block_depends_on_every_token() -> None:
    block = make_block()
    row_BMX = make_rows(6).requires_grad_()
    out_BMX = run(block, row_BMX, [make_order("single")])
    for row in range(NUM_PATCHES + 1):
        (gradient_BMX,) = torch.autograd.grad(out_BMX[0, row].sum(), row_BMX, retain_graph=True)
        assert gradient_BMX.abs().sum(dim=-1).gt(0).all()


def test_a_scan_over_single_tokens_reads_no_summary() -> None:
    class Nothing(nn.Module):
        def forward(self, token_BPX: Tensor, maps: object) -> Tensor:
            raise AssertionError("a summary was made")

    rows = make_rows()
    assert torch.equal(
        run(make_scan(local=Nothing()), rows, make_order("single")), run(make_scan(), rows, make_order("single"))
    )


def test_two_sequences_are_summed() -> None:
    block = make_block(window=3)
    row_BMX = make_rows(6)
    single, pairs = make_order("single"), make_order("local_to_single")
    together = run(block, row_BMX, [single, pairs])
    torch.testing.assert_close(together, run(block, row_BMX, [single]) + run(block, row_BMX, [pairs]))


def test_separate_projections_are_the_mean_of_two_whole_blocks() -> None:
    block = make_block(shared_projections=False)
    row_BMX = make_rows(6)
    order = make_order("single")
    in_forward, in_backward, gate_forward, gate_backward = block.in_proj.weight.split(INNER_WIDTH)
    out_forward, out_backward = block.out_proj.weight.split(INNER_WIDTH, dim=1)
    results = []
    for direction, (projection, gate, out) in enumerate(
        ((in_forward, gate_forward, out_forward), (in_backward, gate_backward, out_backward))
    ):
        x_BME = row_BMX @ projection.T
        steps = order.read_steps[0, direction]
        y_BME = scan_alone(block.scan, x_BME[:, order.rows[0, direction] - NUM_PATCHES], direction)[:, steps]
        results.append((y_BME * F.silu(row_BMX @ gate.T)) @ out.T)
    torch.testing.assert_close(run(block, row_BMX, [order]), sum(results) / 2)


def test_parameters_start_as_in_mamba() -> None:
    scan = BidirectionalScan(50, state_size=4, dt_rank=3, local=None, backend="auto")
    assert torch.allclose(scan.A_log.exp(), torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(100, 4))
    assert torch.equal(scan.D, torch.ones(100))
    step = F.softplus(scan.dt_bias)
    assert step.min() >= 0.999e-3
    assert step.max() <= 0.1001
    assert step.max() / step.min() > 10
    assert scan.dt_proj.abs().max() <= 3**-0.5


def test_the_two_directions_start_with_different_weights() -> None:
    scan = make_scan()
    assert not torch.equal(scan.x_proj[0], scan.x_proj[1])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_low_precision_stays_close_to_float64_with_the_same_weights(dtype: torch.dtype) -> None:
    block = make_block(dtype=dtype)
    row_BMX = make_rows(6).to(dtype)
    order = make_order("single")
    result = run(block, row_BMX, [order])
    assert result.dtype == dtype
    truth = run(block.double(), row_BMX.double(), [order])
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
    run(scan, make_rows().bfloat16(), make_order())
    assert {tensor.dtype for tensor in seen.values()} == {torch.float32}
    assert torch.equal(seen["A"], -scan.A_log.float().exp())


@pytest.mark.parametrize("size", [0.0, 1.0, 2.0, 3.0])
def test_rounding_decay_skip_and_step_bias_to_bf16_changes_outputs_by_no_more_than_bf16_itself(size: float) -> None:
    # A relative error of 2^-9 in log A (up to log 16 = 2.8) is one of 0.6 % in A: less than twice bf16's own steps (0.4 %).
    torch.manual_seed(0)
    exact = BidirectionalScan(16, state_size=16, dt_rank=4, local=WindowMean(3), backend="chunked")
    rounded = copy.deepcopy(exact)
    for parameter in (rounded.A_log, rounded.D, rounded.dt_bias):
        parameter.data = parameter.data.bfloat16().float()
    rows = size * torch.randn(2, 65, 16)
    grids, order = torch.tensor([[8, 8], [8, 8]]), scan_order(torch.tensor([64, 64]), 64, "local_to_single")
    with torch.no_grad():
        truth, result = exact(rows, grids, order), rounded(rows, grids, order)
    assert (result - truth).norm() <= 0.008 * truth.norm()
    assert size == 0 or not torch.equal(result, truth)


def test_an_unknown_backend_is_refused_when_the_block_is_built() -> None:
    with pytest.raises(SettingsError, match="auto, reference"):
        BidirectionalSSM(6, inner_width=4, backend="cuda_magic")
