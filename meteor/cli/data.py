"""`meteor data`: check a run's samples and images, and convert samples of any form to LLaVA's JSON."""

import argparse
import json
from typing import Any

from meteor import storage
from meteor.assembly import Inputs
from meteor.cli.options import add_json, show_progress
from meteor.command_line import DIFFERS, OK, add_run, read_run
from meteor.data.convert import convert
from meteor.planning.data_report import problem_lines
from meteor.planning.run_check import check_run


def add_commands(commands: Any) -> None:
    """Add ``data check`` and ``data convert``."""
    data = commands.add_parser("data", help="check a run's samples and images, convert samples")
    actions = data.add_subparsers(required=True)
    check = actions.add_parser("check", help="find missing, unreadable and duplicate images, bad records, lengths")
    add_run(check)
    check.add_argument(
        "--full", action="store_true", help="decode every image, which finds truncated and duplicate images"
    )
    add_json(check)
    check.set_defaults(command=_check)
    change = actions.add_parser("convert", help="write samples of any form as LLaVA's JSON, with images as files")
    change.add_argument(
        "source", help="file, folder or pattern of .json, .jsonl, .parquet or .tar files; a local path or s3:// URI"
    )
    change.add_argument("--to", required=True, metavar="FOLDER", help="folder for the result, local or s3://")
    add_json(change)
    change.set_defaults(command=_convert)


def _check(arguments: argparse.Namespace) -> int:
    on_progress = None if arguments.json else show_progress("images")
    report = check_run(Inputs(read_run(arguments)), full=arguments.full, on_progress=on_progress)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report.to_text())
    return OK if report.ok else DIFFERS


def _convert(arguments: argparse.Namespace) -> int:
    on_file = None if arguments.json else show_progress("files")
    done = convert(arguments.source, storage.absolute(arguments.to), on_file=on_file)
    if arguments.json:
        print(json.dumps(done.to_dict(), indent=2))
    else:
        print(f"{done.uri}: {done.num_samples:,} samples, with {done.num_images:,} images in {done.images}")
        for line in problem_lines(done.problems):
            print(line)
    return DIFFERS if done.problems else OK
