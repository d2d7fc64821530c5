"""Fused scan on a GPU, against two launches and against hardware limits: `python benchmarks/fusion_gpu.py`.

The input has 64 sub-images of 24 x 24 patches, 1024 channels and 16 states in bfloat16. `--tiny` tries the script on a CPU, in
Triton's interpreter.

The first table measures all steps between the input projection and the gate, forward and with backward. "Fused" is used in
training: a launch that makes the interleaved sequence while reading it, and a scan of both directions that writes only the rows
that are read. "Two launches" writes the window means and each direction's interleaved sequence to memory, convolves them with
torch, and scans each direction separately. Its scans are mamba_ssm's `selective_scan_fn`, if installed, and this project's.

The second table compares each kernel with two lower bounds of its time. The first is the bytes that must move, divided by the
measured bandwidth of a copy. The second is the number of exponentials (one per state, channel, direction and step; two with
backward), divided by the measured rate of a kernel that computes nothing else. The share is the larger bound over the time.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

if "--tiny" in sys.argv:
    # Triton reads this when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from side_by_side import Figures, compare, format_megabytes, format_seconds, print_table
from torch import Tensor

from meteor.errors import MeteorError
from meteor.ssm import BidirectionalScan, ScanOrder, scan_order, selective_scan
from meteor.ssm.tensors import gather_rows
from meteor.ssm.triton_scan import scan_rows
from meteor.ssm.triton_visit import visit_windows
from meteor.ssm.windows import PatchMaps, WindowMean

WINDOW = 3
# Independent values per thread of the exponential kernel, so that an exponential need not wait for the previous one.
IN_FLIGHT = 8


@dataclass(frozen=True)
class Work:
    """Batch before the scan: rows (B, M, E), patch grids and visiting orders, and the module with the weights."""

    scan: BidirectionalScan
    row_BMX: Tensor
    grids: Tensor
    order: ScanOrder

    @property
    def leaves(self) -> list[Tensor]:
        return [self.row_BMX, *self.scan.parameters()]


def main() -> None:
    options = read_options()
    device = torch.device("cpu" if options.tiny else "cuda")
    torch.manual_seed(0)
    work = make_work(device, options)
    compare_layouts(work, device, options.rounds)
    compare_with_floors(work, device, options)


def make_work(device: torch.device, options: argparse.Namespace) -> Work:
    dtype = torch.float32 if options.tiny else torch.bfloat16
    scan = BidirectionalScan(
        options.width, state_size=options.states, dt_rank=64, local=WindowMean(WINDOW), backend="triton"
    ).to(device, dtype)
    num_patches = options.side**2
    grids = torch.tensor([[options.side] * 2] * options.sub_images, device=device)
    row_BMX = torch.randn(options.sub_images, num_patches + 1, options.width, device=device, dtype=dtype)
    order = scan_order(grids.prod(dim=1), num_patches, "local_to_single")
    return Work(scan, row_BMX.requires_grad_(), grids, order)


def compare_layouts(work: Work, device: torch.device, rounds: int) -> None:
    layouts: dict[str, Callable[[], Tensor]] = {"fused": lambda: work.scan(work.row_BMX, work.grids, work.order)}
    for backend in ("mamba_ssm", "triton"):
        run = partial(in_two_launches, work, backend)
        try:
            run()
        except MeteorError as error:
            print(f"{backend}: left out, {error}")
        else:
            layouts[f"two launches, {backend}"] = run
    with torch.no_grad():
        truth = layouts["fused"]().float()
        for run in layouts.values():
            # The layouts differ by two roundings to bfloat16.
            assert (run().float() - truth).abs().max() <= 5e-2 * truth.abs().max()

    def forward(run: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            run()

    def both(run: Callable[[], Tensor]) -> None:
        torch.autograd.grad(run().float().sum(), work.leaves)

    forwards = compare({name: partial(forward, run) for name, run in layouts.items()}, device, rounds)
    boths = compare({name: partial(both, run) for name, run in layouts.items()}, device, rounds)
    print(f"\n{describe(work, device)}; medians of {rounds} rounds\n")
    print_table(
        ["layout", "forward", "time", "memory", "with backward", "time", "memory"],
        [[name, *cells(name, forwards), *cells(name, boths)] for name in layouts],
    )


def cells(name: str, figures: dict[str, Figures]) -> list[str]:
    mine = figures[name]
    ratio = mine.seconds / figures["fused"].seconds
    return [format_seconds(mine.seconds), f"{ratio:.2f} x", format_megabytes(mine.peak_bytes)]


def in_two_launches(work: Work, backend: str) -> Tensor:
    """Compute `BidirectionalScan.forward` with every sequence in memory, (B, M, 2, E)."""
    scan, row_BMX = work.scan, work.row_BMX
    token_BPX = row_BMX[:, :-1]
    maps = PatchMaps.of(work.grids, token_BPX.shape[1], token_BPX.device)
    table_BKX = torch.cat([scan.local(token_BPX, maps), row_BMX], dim=1)
    outputs = []
    for direction in (0, 1):
        own = slice(direction * scan.inner_width, (direction + 1) * scan.inner_width)
        visited_BLX = gather_rows(table_BKX, work.order.rows[:, direction])
        padded_BXL = F.pad(visited_BLX.transpose(1, 2), (3, 0))
        u_BXL = F.silu(F.conv1d(padded_BXL, scan.conv.weight[own], scan.conv.bias[own], groups=scan.inner_width))
        dt_BLR, B_BLN, C_BLN = F.linear(u_BXL.transpose(1, 2), scan.x_proj[direction]).split(scan.sizes, dim=-1)
        y_BXL = selective_scan(
            u_BXL,
            F.linear(dt_BLR, scan.dt_proj[direction]).transpose(1, 2),
            -torch.exp(scan.A_log[own].float()),
            B_BLN.transpose(1, 2),
            C_BLN.transpose(1, 2),
            scan.D[own].float(),
            delta_bias=scan.dt_bias[own].float(),
            delta_softplus=True,
            backend=backend,
        )
        outputs.append(gather_rows(y_BXL.transpose(1, 2), work.order.read_steps[:, direction]))
    return torch.stack(outputs, dim=2)


def compare_with_floors(work: Work, device: torch.device, options: argparse.Namespace) -> None:
    bandwidth, exponentials = measure_bandwidth(device, options.tiny), measure_exponentials(device, options.tiny)
    scan, order = work.scan, work.order
    with torch.no_grad():
        u_BLW = visit(work, work.row_BMX)
        delta_GBLE, B_GBLN, C_GBLN = scan._select(u_BLW)
    two = (2, -1)
    leaves = [
        tensor.detach().contiguous().requires_grad_()
        for tensor in (u_BLW.unflatten(2, two), *(part.permute(1, 2, 0, 3) for part in (delta_GBLE, B_GBLN, C_GBLN)))
    ]
    constants = [
        tensor.detach().float().unflatten(0, two) for tensor in (-torch.exp(scan.A_log.float()), scan.D, scan.dt_bias)
    ]
    num_rows = order.read_steps.shape[2]

    def run_scan() -> Tensor:
        u, delta, B, C = leaves
        A, D, bias = constants
        return scan_rows(
            u, delta, A, B, C, D, bias, True, result_dtype=u.dtype, rows_bgl=order.rows, num_steps_b=order.num_steps,
            first_row=num_rows - 1, num_rows=num_rows,
        )  # fmt: skip

    channels, matrices = (sum(leaf.nbytes for leaf in pair) for pair in (leaves[:2], leaves[2:]))
    result, rows = channels // 2 * num_rows // u_BLW.shape[1], work.row_BMX.nbytes
    num_exponentials = leaves[0].numel() * options.states
    kernels = {
        "scan": (run_scan, leaves, channels + matrices + result, num_exponentials),
        "visit": (lambda: visit(work, work.row_BMX), [work.row_BMX], rows + channels // 2, 0),
    }
    table = []
    for name, (run, inputs, num_bytes, num_exp) in kernels.items():
        gradient = torch.randn_like(run())

        def forward(run: Callable[[], Tensor] = run) -> None:
            with torch.no_grad():
                run()

        def both(run: Callable[[], Tensor] = run, inputs: list[Tensor] = inputs, gradient: Tensor = gradient) -> None:
            torch.autograd.grad(run(), inputs, gradient)

        # The backward pass reads the inputs again and the result's gradient, and writes a gradient of each input.
        both_bytes = 3 * (channels + matrices) + 2 * result if name == "scan" else 3 * rows + channels
        for part, step, moved, taken in (
            ("", forward, num_bytes, num_exp),
            (" with backward", both, both_bytes, 2 * num_exp),
        ):
            seconds = compare({name: step}, device, options.rounds)[name].seconds
            floors = {"bytes": moved / bandwidth, "exponentials": taken / exponentials}
            larger = max(floors, key=floors.__getitem__)
            table.append([name + part, format_seconds(seconds), *map(format_seconds, floors.values()), larger,
                          f"{floors[larger] / seconds:.2f}"])  # fmt: skip
    print(f"\nCopy {bandwidth / 1e12:.3g} TB/s, exponentials {exponentials / 1e12:.3g} T/s\n")
    print_table(["kernel", "time", "bytes", "exponentials", "larger floor", "share"], table)


def visit(work: Work, row_BMX: Tensor) -> Tensor:
    return visit_windows(row_BMX, work.grids, work.order, work.scan.conv.weight, work.scan.conv.bias, window=WINDOW)


def measure_bandwidth(device: torch.device, tiny: bool) -> float:
    """Measure the bandwidth of a large copy: bytes read and written, per second."""
    source = torch.empty((1 << 20) if tiny else (1 << 31), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_of(lambda: target.copy_(source), device)


def measure_exponentials(device: torch.device, tiny: bool) -> float:
    """Measure the exponentials per second of a kernel that computes nothing else."""
    num_programs, num_rounds, block = (2, 2, 32) if tiny else (132 * 64, 4096, 128)
    result = torch.empty(num_programs * block, device=device)
    seconds = best_of(
        lambda: exponentials_alone[(num_programs,)](result, num_rounds, IN_FLIGHT, block, num_warps=4), device
    )
    return num_programs * block * num_rounds * IN_FLIGHT / seconds


@triton.jit
def exponentials_alone(result_ptr, num_rounds, IN_FLIGHT: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)[None, :]
    value = (channel + tl.arange(0, IN_FLIGHT)[:, None]).to(tl.float32) / BLOCK
    for _ in range(num_rounds):
        value = tl.exp2(-value)
    tl.store(result_ptr + tl.program_id(0) * BLOCK + channel, tl.sum(value, axis=0, keep_dims=True))


def best_of(run: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    run()
    best = float("inf")
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def describe(work: Work, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, interpreted: the times mean nothing"
    num_sub_images, num_rows, width = work.row_BMX.shape
    shape = (
        f"{num_sub_images} sub-images, P {num_rows - 1}, C {width}, n {work.scan.A_log.shape[1]}, {work.row_BMX.dtype}"
    )
    return f"{shape}; {name}, torch {torch.__version__}, triton {triton.__version__}"


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use 2 sub-images of 2 x 2 patches in Triton's interpreter")
    parser.add_argument("--sub-images", type=int, default=None, metavar="N", help="sub-images (64; 2 with --tiny)")
    parser.add_argument("--side", type=int, default=None, metavar="N", help="patches per side (24; 2 with --tiny)")
    parser.add_argument(
        "--width", type=int, default=None, metavar="N", help="channels per direction (1024; 32 with --tiny)"
    )
    parser.add_argument("--states", type=int, default=None, metavar="N", help="size of the state (16; 4 with --tiny)")
    parser.add_argument("--rounds", type=int, default=None, metavar="N", help="number of rounds (20; 1 with --tiny)")
    options = parser.parse_args()
    usual = {"sub_images": (64, 2), "side": (24, 2), "width": (1024, 32), "states": (16, 4), "rounds": (20, 1)}
    for name, (full, tiny) in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, tiny if options.tiny else full)
    return options


if __name__ == "__main__":
    main()
