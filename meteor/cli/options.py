"""Options that several subcommands share."""

import argparse
import sys
from collections.abc import Callable

from meteor.config import RunSettings, load_run, resolve_paths


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="FILE", help="run file, or the name of one in jobs/runs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace those of the run file")


def read_run(arguments: argparse.Namespace) -> RunSettings:
    return resolve_paths(load_run(arguments.run, arguments.overrides))


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def show_progress(what: str) -> Callable[[int, int], None] | None:
    """Prints "12 of 100 <what>" over itself on standard error; None where nobody watches."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        if done % max(total // 200, 1) == 0 or done == total:
            print(f"\r{done} of {total} {what}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show
