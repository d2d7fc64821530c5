"""Training that is killed at random moments, against an undisturbed one: `python benchmarks/kills.py` prints a table.

A stage trains on generated images and tiny models, once undisturbed and once through kills (SIGKILL) of a worker, Ray Train's
controller, the command, the node's raylet and the whole cluster. At the end the fp32 master weights, both moments and every
reported loss must be equal bit for bit.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from side_by_side import print_table

from meteor.checkpoint.folder import complete_checkpoints
from meteor.checkpoint.format import KINDS, Checkpoint
from meteor.runs.reading import read_stage
from meteor.synthetic.dataset import write_dataset
from meteor.synthetic.models import make_tiny_models

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "pipelines"))
from kills import KILLS, Kill, command, train_through_kills


def main() -> None:
    """Run the comparison; exit with status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills (20: about ten minutes on two cores)")
    parser.add_argument("--stage", choices=["pretrain", "finetune"], default="pretrain", help="stage to train")
    parser.add_argument("--zero-stage", type=int, default=2, choices=range(4), help="ZeRO stage")
    parser.add_argument("--workers", type=int, default=2, help="number of training workers")
    parser.add_argument("--epochs", type=int, default=300, help="number of epochs of two or three steps each (300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills (0)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if _run(Path(folder), arguments) else 1)


def _run(folder: Path, arguments: argparse.Namespace) -> bool:
    stage, (straight, killed) = arguments.stage, _write_runs(folder, arguments)
    earlier = ["cache_features", *(["pretrain"] if stage == "finetune" else [])]
    for run_file, stages in ((straight, [*earlier, stage]), (killed, earlier[1:])):
        for name in stages:
            subprocess.run(command(name, run_file), check=True, stderr=subprocess.DEVNULL)
    (undisturbed,) = (folder / "straight").glob(f"runs/{stage}-*/checkpoints")
    checkpoints = str(folder / "killed" / undisturbed.relative_to(folder / "straight"))
    kills: list[Kill] = []

    def report(kill: Kill) -> None:
        kills.append(kill)
        print(f"kill {len(kills)} of {arguments.kills}: {kill}", file=sys.stderr, flush=True)

    kinds = [list(KILLS)[i % len(KILLS)] for i in range(arguments.kills)]
    train_through_kills(command(stage, killed), checkpoints, kinds, seed=arguments.seed, report=report)
    rows = [
        [str(i), kill.of, f"{kill.checkpoint}", "went on" if kill.command_went_on else "started again"]
        for i, kill in enumerate(kills, 1)
    ]
    print_table(("kill", "of", "newest checkpoint (step)", "the command"), rows)
    return _compare(str(undisturbed), checkpoints)


def _compare(undisturbed: str, checkpoints: str) -> bool:
    expected, found = (Checkpoint(complete_checkpoints(root)[-1]) for root in (undisturbed, checkpoints))
    tensors = [(kind, name) for kind in KINDS for name in expected.shapes]
    same = sum(torch.equal(expected.read(*tensor), found.read(*tensor)) for tensor in tensors)
    losses = [
        [row["loss"] for row in read_stage(str(Path(root).parent)).metrics] for root in (undisturbed, checkpoints)
    ]
    same_losses = losses[0] == losses[1]
    print(
        f"\nstep {expected.state['step']} and {found.state['step']}; {same} of {len(tensors)} tensors are equal; ",
        end="",
    )
    print(f"{len(losses[0])} and {len(losses[1])} losses reported, {'equal' if same_losses else 'NOT equal'}")
    return expected.state == found.state and same == len(tensors) and same_losses


def _write_runs(folder: Path, arguments: argparse.Namespace) -> tuple[Path, Path]:
    write_dataset(folder / "data", num_scenes=12, num_held_out=8)
    make_tiny_models(folder / "models", train_steps=0, num_threads=1, report=lambda line: None)
    common: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 2, "max_length": 512}
    tried = {**common, "zero_stage": arguments.zero_stage, "epochs": arguments.epochs, "checkpoint_every_steps": 3}
    settings = {
        "data": {
            "roots": {"": f"{folder}/data/images"},
            "pretrain": f"{folder}/data/pretrain.json",
            "finetune": f"{folder}/data/finetune.json",
        },
        "slicing": {"resolution": 56, "max_slices": 2},
        "vision": {"path": f"{folder}/models/clip", "dtype": "float32"},
        "cache": {"uri": f"{folder}/cache"},
        "projector": {"name": "meteor", "settings": {"k": 4, "state_size": 2}},
        "llm": {"path": f"{folder}/models/llm", "dtype": "float32", "gradient_checkpointing": False},
        "pretrain": common,
        "finetune": {**common, "fraction": 0.25},
        "runtime": {"num_workers": arguments.workers, "max_failures": arguments.kills},
    }
    settings[arguments.stage] = {**settings[arguments.stage], **tried}  # type: ignore[dict-item]
    files = []
    for name in ("straight", "killed"):
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**settings, "name": name, "output": f"{folder}/{name}"}))
        files.append(file)
    return files[0], files[1]


if __name__ == "__main__":
    main()
