"""Options that several subcommands share."""

import argparse

from meteor.config import RunSettings, load_run, resolve_paths


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="FILE", help="run file, or the name of one in jobs/runs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace those of the run file")


def read_run(arguments: argparse.Namespace) -> RunSettings:
    return resolve_paths(load_run(arguments.run, arguments.overrides))
