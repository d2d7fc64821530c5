"""`meteor synthetic`: generate images with questions, and tiny models for them."""

import argparse
from pathlib import Path
from typing import Any

from meteor.synthetic.benchmarks import write_benchmarks
from meteor.synthetic.dataset import write_dataset
from meteor.synthetic.models import make_tiny_models


def add_commands(commands: Any) -> None:
    actions = commands.add_parser("synthetic", help="generate images, questions and tiny models").add_subparsers(
        required=True
    )
    data = actions.add_parser("data", help="write images and LLaVA JSON: captions, questions, held-out questions")
    data.add_argument("folder", type=Path)
    data.add_argument("--scenes", type=int, default=240, help="training images (default: %(default)s)")
    data.add_argument("--held-out", type=int, default=60, help="images to evaluate on (default: %(default)s)")
    data.add_argument("--seed", type=int, default=0)
    data.set_defaults(command=_data)
    benchmarks = actions.add_parser(
        "benchmarks",
        help="write a few questions in the file formats of the twelve benchmarks and of NLVR, a folder per benchmark",
    )
    benchmarks.add_argument("folder", type=Path)
    benchmarks.add_argument("--scenes", type=int, default=8, help="images per benchmark (default: %(default)s)")
    benchmarks.add_argument("--seed", type=int, default=0)
    benchmarks.set_defaults(command=_benchmarks)
    models = actions.add_parser(
        "models", help="make a tiny CLIP trained on generated scenes, a tiny Llama and a tokenizer"
    )
    models.add_argument("folder", type=Path)
    models.add_argument("--seed", type=int, default=0)
    models.add_argument(
        "--threads",
        type=int,
        default=2,
        help="threads of torch, whose number decides about the last digits of the weights (default: %(default)s)",
    )
    models.set_defaults(command=_models)


def _data(arguments: argparse.Namespace) -> int:
    dataset = write_dataset(
        arguments.folder, num_scenes=arguments.scenes, num_held_out=arguments.held_out, seed=arguments.seed
    )
    print(f"images and questions: {dataset.folder}")
    return 0


def _benchmarks(arguments: argparse.Namespace) -> int:
    folder = write_benchmarks(arguments.folder, num_scenes=arguments.scenes, seed=arguments.seed)
    print(f"benchmarks: {folder}")
    return 0


def _models(arguments: argparse.Namespace) -> int:
    models = make_tiny_models(arguments.folder, seed=arguments.seed, num_threads=arguments.threads)
    print(f"models: {models.clip} and {models.llm}")
    return 0
