"""`meteor plan`: the plan of a run or of a whole study before it starts."""

import argparse
import json
from typing import Any

from meteor.assembly import Inputs
from meteor.assembly.study import pinned_variants, study_variants
from meteor.cli.options import add_json
from meteor.command_line import OK, add_run, read_run
from meteor.planning.cache_cost import USD_PER_GB
from meteor.planning.rates import RateOptions
from meteor.planning.study import plan_study
from meteor.train.flops import PEAK_TFLOPS

_DESCRIPTION = """Show the cost of a run, or of every variant of its `study:`: finished and shared stages; hours, storage and
money for the other stages; and the work that the cache avoids. Rates are given by options, else measured by finished stages
below --measured, else computed from --gpu and --mfu."""


def add_commands(commands: Any) -> None:
    """Add ``plan``."""
    parser = commands.add_parser(
        "plan", help="show the stages of a run or study that are left, and their cost", description=_DESCRIPTION
    )
    add_run(parser)
    parser.add_argument("--measured", metavar="URI", help="output folder of finished runs (default: the run's own)")
    parser.add_argument(
        "--gpu",
        choices=PEAK_TFLOPS,
        metavar="NAME",
        help=f"GPU whose peak is assumed: {', '.join(PEAK_TFLOPS)} (default: H100 if the run trains on GPUs)",
    )
    parser.add_argument(
        "--mfu", type=_share, default=0.4, help="share of the GPU's peak that training reaches (default: %(default)s)"
    )
    parser.add_argument(
        "--sub-images-per-s", type=float, metavar="N", help="sub-images that one GPU encodes per second"
    )
    parser.add_argument("--questions-per-s", type=float, metavar="N", help="questions that one GPU answers per second")
    parser.add_argument("--usd-per-gpu-hour", type=float, metavar="USD", help="price of a GPU for an hour")
    parser.add_argument(
        "--usd-per-gb",
        type=float,
        default=USD_PER_GB,
        metavar="USD",
        help="price of storing a gigabyte for a month (default: %(default)s)",
    )
    add_json(parser)
    parser.set_defaults(command=_plan)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _plan(arguments: argparse.Namespace) -> int:
    settings = read_run(arguments)
    inputs, runs = Inputs(settings), [settings]
    if settings.study is not None:
        variants = pinned_variants(inputs, study_variants(settings))
        runs = [variant.settings for variant in variants]
    options = RateOptions(
        gpu=arguments.gpu,
        mfu=arguments.mfu,
        sub_images_per_s=arguments.sub_images_per_s,
        questions_per_s=arguments.questions_per_s,
        measured=arguments.measured,
    )
    plan = plan_study(inputs, runs, options)
    prices = {"usd_per_gb": arguments.usd_per_gb, "usd_per_gpu_hour": arguments.usd_per_gpu_hour}
    print(json.dumps(plan.to_dict(**prices), indent=2) if arguments.json else plan.to_text(**prices))
    return OK
