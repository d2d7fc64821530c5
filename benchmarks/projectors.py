"""All projectors side by side: `python benchmarks/projectors.py` (CPU) or `--device cuda`.

Projectors with default settings run on 7 sub-images (six slices and the global view) of 24 x 24 patches, with vision width 1024
and LLM width 5120. Printed are parameters, output tokens, and the times of the forward pass alone and with the backward pass.
Memory is the training pass's peak beyond weights and inputs, gradients included. Times are medians of rounds in which all
projectors take turns; ratios are relative to the plain MLP.
"""

import argparse
from functools import partial

import torch
from fusion import LLM_WIDTH, SIDE, SUB_IMAGES, VISION_WIDTH, place, project, train
from side_by_side import compare, format_megabytes, format_seconds, print_table

from meteor.projector import build_projector
from meteor.projector.registry import PROJECTORS

BASELINE = "mlp"


def main() -> None:
    options = read_options()
    device, side = torch.device(options.device), 6 if options.tiny else SIDE
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    inputs = (
        torch.randn(SUB_IMAGES, side * side, VISION_WIDTH, device=device, dtype=dtype),
        torch.rand(SUB_IMAGES, side * side, device=device),
        torch.tensor([[side, side]] * SUB_IMAGES, device=device),
    )
    widths = {"vision_width": VISION_WIDTH, "llm_width": LLM_WIDTH}
    with device:
        projectors = {name: build_projector(name, **widths).to(dtype) for name in PROJECTORS}
    # The projector `global_view` gets only the global view in training, a single sub-image of the seven.
    given = {name: tuple(part[:1] for part in inputs) if name == "global_view" else inputs for name in projectors}
    forwards = compare(
        {name: partial(project, projector, given[name]) for name, projector in projectors.items()},
        device,
        options.rounds,
    )
    boths = compare(
        {name: partial(train, projector, given[name]) for name, projector in projectors.items()}, device, options.rounds
    )
    rows = []
    for name, projector in projectors.items():
        count = sum(parameter.numel() for parameter in projector.parameters())
        with torch.no_grad():
            tokens = int(projector(*given[name]).mask.sum())
        times = [
            cell
            for figures in (forwards, boths)
            for cell in (
                format_seconds(figures[name].seconds),
                f"{figures[name].seconds / figures[BASELINE].seconds:.2f}",
            )
        ]
        rows.append([name, f"{count / 1e6:.2f} M", f"{tokens:,}", *times, format_megabytes(boths[name].peak_bytes)])
    print(f"\n{SUB_IMAGES} sub-images of {side} x {side} patches, {dtype}, {place(device)}, {options.rounds} rounds\n")
    print_table(
        ["projector", "parameters", "tokens out", "forward", "ratio", "with backward", "ratio", "memory in training"],
        rows,
    )


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="number of rounds (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="use small maps, to try the script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
