"""Options that several subcommands share."""

import argparse
import sys
import time
from collections.abc import Callable

import torch

from meteor.errors import SettingsError
from meteor.formatting import format_duration
from meteor.train.build import DTYPES

CACHE_HELP = "feature cache <root>/<key>/<codec>, as cache_features prints it"
# The remaining time is shown after this many seconds: a shorter measurement is inaccurate.
_MIN_RATE_S = 3


def choose_dtype(device: str, dtype: str | None) -> torch.dtype:
    """Return the type named ``dtype``, by default float32 on cpu and bfloat16 on cuda.

    Raises:
        SettingsError: ``device`` is cuda, and this machine has no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            "--device cuda: torch finds no CUDA device on this machine; omit --device, or set it to cpu"
        )
    return DTYPES[dtype or ("bfloat16" if device == "cuda" else "float32")]


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def show_progress(what: str) -> Callable[[int, int], None] | None:
    """Return a callback that prints "12 of 100 <what>, 2 min 05 s left" on standard error, each line over the last.

    The result is None if standard error is no terminal.
    """
    if not sys.stderr.isatty():
        return None
    first: tuple[int, float] | None = None

    def show(done: int, total: int) -> None:
        nonlocal first
        now_s, left = time.monotonic(), ""
        # Items that were done before the first call took no time of this run.
        first = first or (done, now_s)
        if done % max(total // 200, 1) and done != total:
            return
        if first[0] < done < total and now_s - first[1] >= _MIN_RATE_S:
            left = f", {format_duration((now_s - first[1]) / (done - first[0]) * (total - done))} left"
        # The escape sequence clears the rest of a longer line before.
        print(f"\r{done} of {total} {what}{left}\x1b[K", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show
