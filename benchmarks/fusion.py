"""Selective scan and whole projectors, side by side: `python benchmarks/fusion.py` (CPU) or `--device cuda`.

The first table compares the scan's backends, at the size of two full sub-images, with autograd through the reference loop. It
also shows the forward steps that mamba publishes as its reference (`selective_scan_ref`), which first write every step's decay
and input to memory; the package's own function runs if it is installed. "Unbound" is a reference loop that suits autograd:
sequences are unbound into steps first, so that a step's gradient does not pass through a tensor of all steps. Memory is the
peak beyond the inputs.

The second table shows projectors in training, on 7 sub-images (six slices and the global view) of 24 x 24 patches, with vision
width 1024 and LLM width 5120. The projectors are Meteor's fusion, selection and MLP, LLaVA-UHD's resampler, TokenPacker, and
the plain MLP. Memory is the peak beyond weights and inputs, gradients included.
"""

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from side_by_side import Figures, compare, format_megabytes, format_seconds, print_table
from torch import Tensor

from meteor.errors import MeteorError
from meteor.projector import build_projector
from meteor.ssm import resolve_backend, selective_scan

BATCH, CHANNELS, LENGTH, STATES = 2, 1024, 1153, 16
SUB_IMAGES, SIDE, VISION_WIDTH, LLM_WIDTH = 7, 24, 1024, 5120
BUDGETS = (144, 64, 32)
# TokenPacker makes a token of every 2 x 2, 3 x 3 or 4 x 4 patches: 144, 64 and 36 tokens of 576 patches.
SCALE_FACTORS = {144: 2, 64: 3, 32: 4}
COMPRESSORS = ("meteor", "meteor_37m", "resampler", "tokenpacker")
PUBLISHED, UNBOUND = "mamba's published steps", "reference, unbound"


def main() -> None:
    options = read_options()
    device = torch.device(options.device)
    torch.manual_seed(0)
    if options.only != "projectors":
        compare_scans(device, options.rounds, LENGTH if not options.tiny else 24)
    if options.only != "scan":
        compare_projectors(device, options.rounds, SIDE if not options.tiny else 6)


def compare_scans(device: torch.device, rounds: int, num_steps: int) -> None:
    inputs = make_inputs(device, num_steps)
    run = partial(selective_scan, delta_softplus=True)
    scans: dict[str, Callable[..., Tensor]] = {
        "reference": partial(run, backend="reference"),
        UNBOUND: scan_unbound,
        PUBLISHED: published_steps(),
    }
    for name in ("chunked", "triton", "mamba_ssm"):
        if is_usable(name, inputs["u"]):
            scans[name] = partial(run, backend=name)
    check(scans, inputs)

    def forward(scan: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            scan(**inputs)

    def both(scan: Callable[..., Tensor]) -> None:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        torch.autograd.grad(scan(**leaves).sum(), list(leaves.values()))

    # mamba's published steps suit only the forward pass: for each step, autograd would make a tensor of all steps.
    trained = {name: scan for name, scan in scans.items() if name != PUBLISHED}
    forwards = compare({name: partial(forward, scan) for name, scan in scans.items()}, device, rounds)
    boths = compare({name: partial(both, scan) for name, scan in trained.items()}, device, rounds)
    shape = f"b {BATCH}, d {CHANNELS}, l {num_steps}, n {STATES}, float32"
    print(
        f"\nSelective scan, {shape}, {place(device)}, medians of {rounds} rounds; speed relative to the reference loop\n"
    )
    header = ["backend", "forward", "speed", "memory", "with backward", "speed", "memory"]
    print_table(
        header,
        [[name, *cells(name, forwards), *(cells(name, boths) if name in boths else ["-"] * 3)] for name in scans],
    )


def cells(name: str, figures: dict[str, Figures]) -> list[str]:
    mine = figures[name]
    ratio = figures["reference"].seconds / mine.seconds
    return [format_seconds(mine.seconds), f"{ratio:.1f} x", format_megabytes(mine.peak_bytes)]


def make_inputs(device: torch.device, num_steps: int) -> dict[str, Tensor]:
    """Make inputs with values as in training: step sizes of 0.001 to 0.1 after softplus, decays of -1 to -n."""
    u, delta = (torch.randn(BATCH, CHANNELS, num_steps, device=device) for _ in range(2))
    B, C = (torch.randn(BATCH, STATES, num_steps, device=device) for _ in range(2))
    A = -torch.arange(1.0, STATES + 1, device=device).repeat(CHANNELS, 1)
    return {"u": u, "delta": delta - 4, "A": A, "B": B, "C": C, "D": torch.ones(CHANNELS, device=device)}


def published_steps() -> Callable[..., Tensor]:
    """Return mamba_ssm's own reference function or, without the package, a copy of its steps."""
    try:
        interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except ImportError:
        return scan_by_published_steps
    return partial(interface.selective_scan_ref, delta_softplus=True)


def scan_by_published_steps(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    delta = F.softplus(delta)
    decay_bdln = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    input_bdln = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state_bdn = A.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for step in range(u.shape[2]):
        state_bdn = decay_bdln[:, :, step] * state_bdn + input_bdln[:, :, step]
        outputs.append(torch.einsum("bdn,bn->bd", state_bdn, C[:, :, step]))
    return torch.stack(outputs, dim=2) + u * D.unsqueeze(-1)


def scan_unbound(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    delta = F.softplus(delta)
    state_bdn = A.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for u_bd, delta_bd, B_bn, C_bn in zip(*(tensor.unbind(-1) for tensor in (u, delta, B, C)), strict=True):
        decay_bdn = torch.exp(delta_bd.unsqueeze(-1) * A)
        state_bdn = decay_bdn * state_bdn + (delta_bd * u_bd).unsqueeze(-1) * B_bn.unsqueeze(1)
        outputs.append((state_bdn * C_bn.unsqueeze(1)).sum(dim=-1))
    return torch.stack(outputs, dim=-1) + u * D.unsqueeze(-1)


def is_usable(backend: str, tensor: Tensor) -> bool:
    try:
        resolve_backend(backend, tensor)
    except MeteorError:
        return False
    return backend not in ("triton", "mamba_ssm") or tensor.is_cuda


def check(scans: dict[str, Callable[..., Tensor]], inputs: dict[str, Tensor]) -> None:
    """Check that all scans give equal results."""
    with torch.no_grad():
        truth = scans["reference"](**inputs)
        for scan in scans.values():
            torch.testing.assert_close(scan(**inputs), truth, rtol=1e-4, atol=1e-4)


def compare_projectors(device: torch.device, rounds: int, side: int) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = (
        torch.randn(SUB_IMAGES, side * side, VISION_WIDTH, device=device, dtype=dtype),
        torch.rand(SUB_IMAGES, side * side, device=device),
        torch.tensor([[side, side]] * SUB_IMAGES, device=device),
    )
    rows = []
    for budget in BUDGETS:
        names = COMPRESSORS if budget != BUDGETS[0] else (*COMPRESSORS, "mlp")
        projectors = {name: make_projector(name, budget, device, dtype) for name in names}
        forwards = compare(
            {name: partial(project, projector, inputs) for name, projector in projectors.items()}, device, rounds
        )
        boths = compare(
            {name: partial(train, projector, inputs) for name, projector in projectors.items()}, device, rounds
        )
        for name, projector in projectors.items():
            count = sum(parameter.numel() for parameter in projector.parameters())
            times = [
                f"{format_seconds(figures[name].seconds)} | {figures[name].seconds / figures['meteor'].seconds:.2f}"
                for figures in (forwards, boths)
            ]
            with torch.no_grad():
                tokens = projector(*inputs).tokens.shape[1]
            rows.append([name, str(tokens), *times, format_megabytes(boths[name].peak_bytes), f"{count / 1e6:.2f} M"])
    print(
        f"\nProjectors, {SUB_IMAGES} sub-images of {side} x {side} patches, {dtype}, {place(device)}, medians of {rounds} "
        "rounds; time relative to meteor's at an equal number of tokens (mlp: at 144)\n"
    )
    header = ["projector", "tokens", "forward", "ratio", "with backward", "ratio", "memory in training", "parameters"]
    print_table(header, rows)


def make_projector(name: str, budget: int, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    settings = {"mlp": {}, "tokenpacker": {"scale_factor": SCALE_FACTORS[budget]}}.get(name, {"k": budget})
    with device:
        return build_projector(name, vision_width=VISION_WIDTH, llm_width=LLM_WIDTH, **settings).to(dtype)


@torch.no_grad()
def project(projector: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    projector(*inputs)


def train(projector: torch.nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Compute the gradients that an optimizer would use in a step, and drop them."""
    parameters = [parameter for parameter in projector.parameters() if parameter.requires_grad]
    return torch.autograd.grad(projector(*inputs).tokens.float().square().sum(), parameters)


def place(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="number of rounds (default: %(default)s)")
    parser.add_argument("--only", choices=["scan", "projectors"], help="the only table to print")
    parser.add_argument("--tiny", action="store_true", help="use short sequences and small maps, to try the script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
