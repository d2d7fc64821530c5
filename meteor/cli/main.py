"""Entry point of the `meteor` command."""

import argparse
import logging
import sys
from collections.abc import Sequence

from transformers.utils import logging as transformers_logging

import meteor
from meteor.cli import cache, compare, config, data, generate, plan, project, synthetic, verify
from meteor.command_line import parse, run_command

_COMMANDS = (config, data, plan, cache, project, generate, compare, verify, synthetic)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; see `meteor.command_line` for the exit status."""
    parser = argparse.ArgumentParser(
        prog="meteor",
        description="Settings, data, costs, feature caches, visual tokens, answers, comparisons, checks, generated examples.",
    )
    parser.add_argument("--version", action="version", version=f"meteor {meteor.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in _COMMANDS:
        module.add_commands(commands)
    arguments = parse(parser, argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.disable_progress_bar()
    return run_command(lambda: arguments.command(arguments))


if __name__ == "__main__":
    sys.exit(main())
