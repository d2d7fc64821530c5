"""`meteor verify`: check of everything that runs wrote against its checksums."""

import argparse
from typing import Any

from meteor.cli.options import show_progress
from meteor.command_line import DIFFERS, OK
from meteor.errors import NotFoundError
from meteor.formatting import format_amount
from meteor.runs.verify import verify

_DESCRIPTION = """Read every file that runs wrote below PATH, and compare it with its checksum: stages, checkpoints, projectors,
models, pins. Exit status 1 if a file is damaged or missing. `meteor cache verify` checks feature caches."""


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("verify", help="check the files of runs for damage", description=_DESCRIPTION)
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="output folder of runs, folder of a stage or model, or a projector file; local or s3://",
    )
    parser.set_defaults(command=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    num_checks = num_problems = 0
    for path in arguments.paths:
        for outcome in verify(path, show_progress("checks")):
            state = "DAMAGED" if outcome.problems else "ok"
            print(f"{state:<8} {outcome.uri}  {format_amount(outcome.num_checks, 'check')}")
            for problem in outcome.problems:
                print(f"         {problem}")
            num_checks += outcome.num_checks
            num_problems += len(outcome.problems)
    if not num_checks:
        places = ", ".join(arguments.paths)
        raise NotFoundError(
            f"{places} holds no file with a checksum: give the output folder of runs, or a folder that a stage printed"
        )
    print(f"{format_amount(num_checks, 'check')}, {format_amount(num_problems, 'problem')}")
    return DIFFERS if num_problems else OK
