"""`meteor data check`: check that a run's samples and images exist, are readable, and short enough."""

import argparse
import json
from typing import Any

from meteor.assembly import Inputs
from meteor.cli.options import add_json, show_progress
from meteor.command_line import DIFFERS, OK, add_run, read_run
from meteor.planning.run_check import check_run


def add_commands(commands: Any) -> None:
    """Add ``data check``."""
    actions = commands.add_parser("data", help="check a run's samples and images").add_subparsers(required=True)
    check = actions.add_parser("check", help="find missing, unreadable and duplicate images, bad records, lengths")
    add_run(check)
    check.add_argument(
        "--full", action="store_true", help="decode every image, which finds truncated and duplicate images"
    )
    add_json(check)
    check.set_defaults(command=_check)


def _check(arguments: argparse.Namespace) -> int:
    on_progress = None if arguments.json else show_progress("images")
    report = check_run(Inputs(read_run(arguments)), full=arguments.full, on_progress=on_progress)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report.to_text())
    return OK if report.ok else DIFFERS
