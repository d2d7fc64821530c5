"""Comparison of functions in one process: timed in turn, so that a slow moment affects all; and their memory."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Figures:
    """Time and memory of a function.

    Attributes:
        seconds: median duration over the rounds.
        peak_bytes: peak memory in bytes, beyond the memory in use before the call.
    """

    seconds: float
    peak_bytes: int


def compare(runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, Figures]:
    """Warm up each function, time all in turn for ``rounds`` rounds, then measure the memory of each alone."""
    if device.type == "cpu":
        # glibc adapts its thresholds to these values after a few large tensors; setting them makes all rounds alike.
        _set_allocator(mmap_threshold=32 << 20, trim_threshold=64 << 20)
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            _synchronise(device)
            started = time.perf_counter()
            run()
            _synchronise(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: Figures(statistics.median(seconds[name]), _peak_bytes(run, device)) for name, run in runs.items()}


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as Markdown."""
    for cells in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(cells)} |")


def format_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def format_megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"


def _peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    # With low thresholds every tensor has its own pages, which are returned to the system when the tensor is freed.
    _set_allocator(mmap_threshold=64 << 10, trim_threshold=64 << 10)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current resident size
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _set_allocator(*, mmap_threshold: int, trim_threshold: int) -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
    libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
