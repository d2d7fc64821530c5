"""Command line that all stages share."""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import ray.exceptions

from meteor.assembly import Inputs
from meteor.command_line import DIFFERS, ERROR, OK, add_run, parse, print_error, read_run, run_command
from meteor.planning.run_check import check_run
from meteor.runs.folder import Summary
from meteor.stopping import stoppable
from pipelines.ray_parts.logs import configure_logging
from pipelines.ray_parts.runtime import find_meteor_error, ray_session


def stage_main(
    stage: str,
    description: str,
    run: Callable[[Inputs], Summary],
    plan: Callable[[Inputs], str],
    argv: Sequence[str] | None = None,
    *,
    short: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run the command line of a stage.

    Args:
        stage: name of the module below `pipelines`.
        description: text of ``--help``.
        run: function that runs the stage.
        plan: function that returns the text of ``--dry-run``.
        argv: words of the command line.
        short: options that are short for a setting: ``{"--k": "evaluate.k"}``.

    Returns:
        The exit status, see `meteor.command_line`. With ``--dry-run`` it is 1 if the data check finds a problem.
    """
    parser = stage_parser(stage, description)
    for option, setting in short.items():
        parser.add_argument(
            option,
            dest="short",
            action="append",
            default=[],
            type=f"{setting}={{}}".format,
            metavar=setting.rpartition(".")[2].upper(),
            help=f"short for {setting}={setting.rpartition('.')[2].upper()}",
        )
    arguments = parse(parser, argv)
    if short:
        arguments.overrides = [*arguments.overrides, *arguments.short]

    def act() -> int:
        inputs = Inputs(read_run(arguments))
        if arguments.dry_run:
            report = check_run(inputs)
            print(report.to_text(), end="\n\n")
            print(plan(inputs))
            return OK if report.ok else DIFFERS
        with ray_session(inputs.settings.runtime):
            print(run(inputs).to_text())
        return OK

    return guarded(act)


def stage_parser(stage: str, description: str) -> argparse.ArgumentParser:
    """Make a parser with the options that all stages have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines.{stage}",
        description=description,
        epilog="`meteor config explain` prints all settings with their meaning.",
    )
    add_run(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the data and print the plan; only records and tokens of the samples are kept, for the real start",
    )
    return parser


def guarded(act: Callable[[], int]) -> int:
    """Call ``act`` with this project's logging and return its exit status.

    Errors of this project become one line and status 2, even if a remote task raised them. Unexpected errors keep their
    traceback. A signal that stops the command becomes one line and status 128 + its number, after everything is cleaned up.
    """
    configure_logging()
    try:
        with stoppable():
            return run_command(act, when_stopped="stopped; the same command goes on from where it stopped")
    # Ray replaces the class and the text of an error that a remote task raised.
    except ray.exceptions.RayError as error:
        line = find_meteor_error(error)
        if line is None:
            raise
        print_error(*line.split(": ", 1))
        return ERROR


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds since the start of the block."""
    started = time.perf_counter()
    yield lambda: time.perf_counter() - started
