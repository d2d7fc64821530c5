"""Conventions of all command lines: run files and overrides, exit statuses, one line per error.

Exit statuses: 0 for success; 1 if a check failed, or if two things that were compared differ; 2 for a wrong command line or an
error, whose message is on standard error. A signal that stops the command adds 128 to its number: Ctrl-C makes 130.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence

from meteor.config import RunSettings, load_run, resolve_paths
from meteor.errors import MeteorError
from meteor.secrets import redact
from meteor.stopping import stop_signal

OK, DIFFERS, ERROR = 0, 1, 2


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add ``--run FILE`` and overrides; overrides may stand before and after any option."""
    parser.add_argument(
        "--run", required=True, metavar="FILE", help="run file, or the name of a run file in jobs/runs/"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace those of the run file")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; collect overrides from everywhere, as argparse accepts them in one place only."""
    arguments, rest = parser.parse_known_args(argv)
    wrong = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def read_run(arguments: argparse.Namespace) -> RunSettings:
    """Read the command line's run file with its overrides; local paths become absolute."""
    return resolve_paths(load_run(arguments.run, arguments.overrides))


def run_command(act: Callable[[], int], *, when_stopped: str = "stopped") -> int:
    """Call ``act`` and return its exit status; print the message of a `MeteorError` and return `ERROR`.

    Args:
        act: function that does the command's work.
        when_stopped: line that is printed if a signal stops the command and nothing more is known.
    """
    try:
        return act()
    except KeyboardInterrupt as error:
        print(str(error) or when_stopped, file=sys.stderr)
        return 128 + (stop_signal() or signal.SIGINT)
    except MeteorError as error:
        print_error(type(error).__name__, str(error))
        return ERROR


def print_error(kind: str, message: str) -> None:
    """Print one error on standard error."""
    print(redact(f"{kind}: {message}"), file=sys.stderr)
