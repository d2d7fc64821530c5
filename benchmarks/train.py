"""Training steps from cached features against the usual way, on equal samples: `python benchmarks/train.py`.

Three ways take turns in one process with one engine (plain torch, one worker), so that they share weights, master weights and
moments:

- usual: loader threads decode and slice images, the frozen CLIP runs inside the step, each sample has a padded row, and all
  logits are computed;
- cached: features come from a cache on disk, everything else is as in "usual";
- packed: features come from the cache, a row holds several samples without padding in between, and only the logits of answers
  are computed, in chunks. The stages use this way by default.

`--shape small` is for a CPU. `1b` and `7b` are Llama's shapes with CLIP ViT-L/14-336, random weights and bfloat16, for a GPU.
Memory is the peak of a step beyond the engine's state. MFU does not count CLIP's FLOPs or recomputed activations.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from side_by_side import Figures, compare, format_megabytes, format_seconds, print_table
from train_work import SHAPES, Work, load_pixels, make_work

from meteor.constants import IGNORE_INDEX
from meteor.model.attention import VARLEN, suits_varlen
from meteor.train.build import checkpoint_activations, compile_layers, freeze_for
from meteor.train.engine import make_engine
from meteor.train.flops import ModelFlops, peak_flops
from meteor.train.loading import load_batches
from meteor.train.loop import LoadBatches, train
from meteor.train.plan import Batching, Recipe, StepPlan

MAX_LENGTH = 2048


@dataclass
class Way:
    """Way to train, with the metrics of its steps.

    Attributes:
        load: loader of the batches.
        batching: layout of samples in rows.
        rows_at_once: number of rows of a forward pass.
        all_logits: whether the loss is transformers' own, from the logits of all tokens.
        attention: attention of the language model.
        metrics: metrics of the steps so far.
    """

    load: LoadBatches
    batching: Batching
    rows_at_once: int
    all_logits: bool
    attention: str
    metrics: list[dict[str, Any]] = field(default_factory=list)


class Unsaved:
    """Engine without state to save, because this benchmark does not measure checkpoints."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def fragments(self) -> Iterator[Any]:
        return iter(())

    def shapes(self) -> dict[str, list[int]]:
        return {}


def main() -> None:
    options = read_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        projector = {"name": "meteor", "k": options.k}
        work = make_work(Path(folder), options.shape, projector, options.batch * options.steps, device)
        freeze_for(work.model, options.stage)
        if options.checkpointing:
            checkpoint_activations(work.model)
        if options.compile:
            compile_layers(work.model, zero_stage=0)
        engine = Unsaved(
            make_engine(work.model, zero_stage=0, dtype=dtype, device=device, max_grad_norm=1.0, empty_inputs={})
        )
        ways = {name: way for name, way in make_ways(work, device, dtype, options).items() if name in options.ways}
        peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
        flops = ModelFlops.of(work.model, peak) if peak else None
        runs = {name: partial(run, work, engine, way, options, folder, flops) for name, way in ways.items()}
        describe(work, device, options)
        report(compare(runs, device, options.rounds), ways, options)


def make_ways(work: Work, device: torch.device, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Way]:
    cached = partial(
        load_batches,
        table=work.table,
        source=work.cache,
        collate=work.collate,
        num_threads=options.threads,
        max_bytes=512 << 20,
    )
    pixels = partial(load_pixels, work=work, num_threads=options.threads, dtype=dtype)
    fast = VARLEN if suits_varlen(device, dtype) else "sdpa"
    return {
        "usual": Way(pixels, "padded", options.samples_at_once, True, "sdpa"),
        "cached": Way(cached, "padded", options.samples_at_once, True, "sdpa"),
        "packed": Way(cached, "packed", options.rows_at_once, False, fast),
    }


def run(work: Work, engine: Any, way: Way, options: argparse.Namespace, folder: str, flops: ModelFlops | None) -> None:
    """Run all steps of the plan through the stages' training loop."""
    recipe = Recipe(
        lr=1e-5,
        global_batch_size=options.batch,
        micro_batch_size=way.rows_at_once,
        epochs=1,
        warmup_ratio=0.0,
        seed=0,
        native_warmup=0.0,
        native_weight_full=0.2,
        aux_loss_coefficient=0.0,
        batching=way.batching,
        max_length=MAX_LENGTH,
        checkpoint_every_steps=None,
        checkpoint_every_s=1e9,
        keep_checkpoints=1,
    )
    way.metrics.clear()
    with prepared(work.model, way):
        train(
            engine,
            StepPlan(work.table, recipe, "benchmark"),
            recipe,
            load_batches=way.load,
            checkpoints=f"{folder}/checkpoints",
            start_step=0,
            on_step=way.metrics.append,
            flops=flops,
        )


@contextmanager
def prepared(model: Any, way: Way) -> Iterator[None]:
    model.language_model.set_attn_implementation(way.attention)
    if way.all_logits:
        model._answer_loss = MethodType(loss_of_all_logits, model)
    try:
        yield
    finally:
        model.__dict__.pop("_answer_loss", None)


def loss_of_all_logits(self: Any, arranged: Any, inputs: Any, labels: Any, _: Any, num_items: Any) -> torch.Tensor:
    """Compute the loss as transformers' models do: logits of every token in float32."""
    logits = self.language_model(**inputs).logits.flatten(0, 1).float()
    next_labels = labels.new_full(logits.shape[:1], IGNORE_INDEX)
    next_labels[arranged.place_N] = arranged.tokens.next_labels(labels)
    return F.cross_entropy(logits, next_labels, ignore_index=IGNORE_INDEX, reduction="sum") / num_items


def describe(work: Work, device: torch.device, options: argparse.Namespace) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    parts = {
        "language model": work.model.language_model,
        "projector": work.model.projector,
        "CLIP": work.model.vision_tower,
    }
    sizes = ", ".join(
        f"{part} {sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.1f} M"
        for part, module in parts.items()
    )
    totals = work.table.totals()
    print(f"{name}, torch {torch.__version__}; {sizes} parameters")
    print(
        f"{options.stage}, K {options.k}, checkpointing {options.checkpointing}, compile {options.compile}: "
        f"{options.steps} steps of {options.batch} samples, {totals['sub_images'] / len(work.table):.1f} sub-images and "
        f"{(totals['visual_tokens'] + totals['text_tokens']) / len(work.table):.0f} tokens each; median of {options.rounds}\n"
    )


def report(figures: dict[str, Figures], ways: dict[str, Way], options: argparse.Namespace) -> None:
    first = next(iter(figures))
    rows = []
    for name, figure in figures.items():
        metrics = ways[name].metrics
        later = metrics[1:]
        wait = (
            f"{sum(row['loader_wait_s'] for row in later) / sum(row['seconds'] for row in later):.1%}" if later else "-"
        )
        mfu = f"{statistics.median(row['mfu'] for row in metrics):.3f}" if "mfu" in metrics[0] else "-"
        rows.append(
            [
                name,
                format_seconds(figure.seconds / options.steps),
                f"{figure.seconds / figures[first].seconds:.2f} x",
                format_megabytes(figure.peak_bytes),
                f"{figure.peak_bytes / figures[first].peak_bytes:.2f} x",
                f"{statistics.mean(row['padding_share'] for row in metrics):.0%}",
                wait,
                mfu,
            ]
        )
    print_table(
        [
            "way",
            "time per step",
            "ratio",
            "memory beyond the state",
            "ratio",
            "padding",
            "loader wait after the first step",
            "MFU",
        ],
        rows,
    )


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="size of the model (small)")
    parser.add_argument("--stage", choices=["pretrain", "finetune"], default="finetune", help="stage (finetune)")
    parser.add_argument(
        "--ways", nargs="+", default=["usual", "cached", "packed"], help="ways; ratios are to the first"
    )
    parser.add_argument("--k", type=int, default=64, help="visual tokens per sub-image (64)")
    parser.add_argument("--batch", type=int, default=16, help="samples per step (16)")
    parser.add_argument("--steps", type=int, default=3, help="steps per round (3)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (3)")
    parser.add_argument("--samples-at-once", type=int, default=4, help="samples per forward pass of padded rows (4)")
    parser.add_argument(
        "--rows-at-once", type=int, default=1, help=f"packed rows of {MAX_LENGTH} tokens per forward pass (1)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of the loader (2)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--compile", action="store_true", help="compile the decoder's layers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
