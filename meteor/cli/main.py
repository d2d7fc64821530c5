"""Entry point of the `meteor` command."""

import argparse
import logging
import sys
from collections.abc import Sequence

from transformers.utils import logging as transformers_logging

import meteor
from meteor.cli import cache, compare, config, data, generate, plan, project, synthetic
from meteor.errors import MeteorError

_ROOMS = (config, data, plan, cache, project, generate, compare, synthetic)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        0; 1 where a check failed; 2 after an error, whose message was printed.
    """
    parser = argparse.ArgumentParser(
        prog="meteor",
        description="Settings, data, costs, feature caches, visual tokens, answers, comparisons, generated examples.",
    )
    parser.add_argument("--version", action="version", version=f"meteor {meteor.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for room in _ROOMS:
        room.add_commands(commands)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.disable_progress_bar()
    try:
        return arguments.command(arguments)
    except MeteorError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
