"""Planning a training stage, by the number of samples: `python benchmarks/planning.py`.

Each measurement is a process of its own. The first plan of a file parses the records, computes the tokens, and keeps both. The
plan of a later command finds both. For the sizes of ``--one-by-one`` a third process plans as was done before there were
columns: all samples are Python objects, and each is tokenised and laid out by itself. The steps are those of
`meteor.assembly.sample_tables`: records, tokens, the index and its digest, the table, the check that the cache has every
image, and the table's file.

Samples have the shape of LLaVA's 665K mixture; see `mixture_shape` for what stands in for its words, images and tokenizer.
"""

import argparse
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import mixture_shape
import pyarrow as pa
import pyarrow.compute as pc
from side_by_side import print_table

from meteor import storage
from meteor.assembly.features import indexed_images
from meteor.cache import DatasetIndex
from meteor.cache.table import table_bytes
from meteor.data.collate import ImageLayout, num_image_tokens
from meteor.data.indexed_images import IndexedImages
from meteor.data.sample_sets import load_set
from meteor.data.samples import Sample, iter_samples, load_samples
from meteor.data.table_plan import plan_table
from meteor.data.token_table import tokenise_set
from meteor.image.budget import visual_token_budget
from meteor.image.pixels import PixelSettings
from meteor.progress import ProgressLog
from meteor.text.batches import BatchTokeniser
from meteor.text.segments import Text
from meteor.text.template import render
from meteor.text.tokenizer import load_tokenizer
from meteor.text.tokens import tokenise

TEMPLATE, MAX_LENGTH = "vicuna_v1", 2048
BUDGET, PIXELS = visual_token_budget("meteor", {}), PixelSettings()


def main() -> None:
    options = read_options()
    folder = Path(options.folder)
    if options.tokenisers:
        prepare(folder, 20_000)
        compare_tokenisers(folder)
        return
    if options.child:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
        print(json.dumps(CHILDREN[options.child](folder, options.samples[0])))
        return
    rows = []
    for num_samples in options.samples:
        prepare(folder, num_samples)
        shutil.rmtree(folder / f"kept-{num_samples}", ignore_errors=True)
        kinds = ["first", "again"] + ["one by one"] * (num_samples in options.one_by_one)
        for kind in kinds:
            command = [
                sys.executable,
                __file__,
                "--folder",
                str(folder),
                "--samples",
                str(num_samples),
                "--child",
                kind,
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append([f"{num_samples:,}", kind, *as_row(json.loads(done.stdout.splitlines()[-1]), num_samples)])
            print_table(HEADINGS, rows[-1:])
    print_table(HEADINGS, rows)


HEADINGS = ["samples", "plan", "wall", "CPU", "samples/s", "peak memory", "children", "steps (wall)"]


def compare_tokenisers(folder: Path) -> None:
    """Time the ways to tokenise the texts of 2,000 samples, best of three, in a separate process."""
    tokenizer = load_tokenizer(str(folder / "llm"))
    samples = list(islice(iter_samples(str(folder / "20000.json")), 2000))
    conversations = [sample.conversation for sample in samples if isinstance(sample, Sample)]
    segments = [render(conversation, TEMPLATE) for conversation in conversations]
    texts = [part.text for parts in segments for part in parts if isinstance(part, Text)]
    backend = tokenizer.backend_tokenizer

    def encode_batch(threads: str) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = threads
        for encoding in backend.encode_batch(texts, add_special_tokens=False):
            _ = encoding.ids, encoding.offsets

    batches = BatchTokeniser(tokenizer, TEMPLATE)
    ways = {
        "`tokenise`, one by one": lambda: [tokenise(each, tokenizer, TEMPLATE) for each in conversations],
        "`encode_batch`, ids and offsets alone": lambda: encode_batch("false"),
        "`encode_batch` by its own threads": lambda: encode_batch("true"),
        "`BatchTokeniser`, one thread": lambda: batches(conversations),
    }
    rows = []
    for name, way in ways.items():
        times = []
        for _ in range(3):
            start = time.perf_counter(), _cpu_s()
            way()
            times.append((time.perf_counter() - start[0], _cpu_s() - start[1]))
        wall_s, cpu_s = min(times)
        rows.append([name, f"{wall_s:.2f} s", f"{cpu_s:.2f} s", f"{len(conversations) / cpu_s:,.0f}"])
    print_table(["2,000 samples", "wall", "CPU", "samples per CPU second"], rows)


def as_row(found: dict[str, Any], num_samples: int) -> list[str]:
    steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found["steps"].items() if seconds >= 0.05)
    return [
        f"{found['wall_s']:.1f} s",
        f"{found['cpu_s']:.1f} s",
        f"{num_samples / found['wall_s']:,.0f}",
        f"{found['peak_gb']:.2f} GB",
        f"{found['children_gb']:.2f} GB",
        steps,
    ]


def prepare(folder: Path, num_samples: int) -> None:
    """Write what is not there yet: tokenizer, annotation file, index."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{num_samples}.json"
    if file.exists() and (folder / f"index-{num_samples}").exists():
        return
    paragraphs = mixture_shape.corpus()
    if not (folder / "llm").exists():
        mixture_shape.make_tokenizer(folder / "llm", paragraphs)
    if not file.exists():
        mixture_shape.write_records(file, mixture_shape.make_records(num_samples, paragraphs))
    names = {name for sample in iter_samples(str(file)) if isinstance(sample, Sample) for name in sample.images}
    index = storage.join(str(folder), f"index-{num_samples}", "v00000001.parquet")
    storage.write_bytes(index, table_bytes(mixture_shape.make_index(pa.array(sorted(names), pa.string()))))


class Steps:
    """Seconds of each step, and what the process took in all."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter(), _cpu_s()

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - start
        return result

    def result(self) -> dict[str, Any]:
        start_s, start_cpu_s = self._start
        own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return {
            "wall_s": time.perf_counter() - start_s,
            "cpu_s": _cpu_s() - start_cpu_s,
            "peak_gb": own.ru_maxrss * 1024 / 1e9,
            "children_gb": children.ru_maxrss * 1024 / 1e9,
            "steps": self.seconds,
        }


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def plan_columns(folder: Path, num_samples: int) -> dict[str, Any]:
    steps, kept = Steps(), str(folder / f"kept-{num_samples}")
    tokenizer = steps("tokenizer", lambda: load_tokenizer(str(folder / "llm")))
    file = str(folder / f"{num_samples}.json")
    samples = steps("records", lambda: load_set(file, name="finetune", folder=kept, on_progress=ProgressLog("reading")))
    tokens = steps(
        "tokens",
        lambda: tokenise_set(samples, tokenizer, TEMPLATE, folder=kept, on_progress=ProgressLog("tokenising")),
    )
    index = steps("index", lambda: DatasetIndex.open(str(folder / f"index-{num_samples}"), 1))
    steps("digest", lambda: index.digest(samples.distinct_images))
    images = steps("images", lambda: IndexedImages.from_rows(index.rows_named(samples.distinct_images), {}))
    plan = steps(
        "plan",
        lambda: plan_table(samples, tokens, images, budget=BUDGET, pixels=PIXELS, max_length=MAX_LENGTH),
    )
    cached = index.table["image_key"].combine_chunks()
    steps("cache", lambda: pc.all(pc.is_in(plan.table.flat_image_keys(), value_set=cached)))
    steps("write", lambda: plan.table.write(str(folder / f"plan-{num_samples}.parquet")))
    return steps.result()


def plan_one_by_one(folder: Path, num_samples: int) -> dict[str, Any]:
    steps, file = Steps(), str(folder / f"{num_samples}.json")
    tokenizer = steps("tokenizer", lambda: load_tokenizer(str(folder / "llm")))
    samples, _ = steps("records", lambda: load_samples(file))
    index = steps("index", lambda: DatasetIndex.open(str(folder / f"index-{num_samples}"), 1))
    names = {name for sample in samples for name in sample.images}
    steps("digest", lambda: index.digest(names))
    images = steps("images", lambda: indexed_images(index, pa.array(sorted(names), pa.string()), {}))

    def plan() -> pa.Table:
        rows = []
        for sample in samples:
            plans = [PIXELS.plan(images[name].width, images[name].height) for name in sample.images]
            layouts = [ImageLayout(plan.grid, plan.patch_grids) for plan in plans]
            tokens = tokenise(sample.conversation, tokenizer, TEMPLATE, sample_id=sample.id)
            rows.append(
                {
                    "sample_id": sample.id,
                    "input_ids": tokens.input_ids,
                    "labels": tokens.labels,
                    "turns": tokens.turns,
                    "image_keys": [images[name].image_key for name in sample.images],
                    "length": len(tokens.input_ids) + sum(num_image_tokens(layout, BUDGET) for layout in layouts),
                }
            )
        return pa.Table.from_pylist(rows)

    table = steps("tokens and plan", plan)
    steps("write", lambda: storage.write_bytes(str(folder / "one_by_one.parquet"), table_bytes(table)))
    return steps.result()


CHILDREN = {"first": plan_columns, "again": plan_columns, "one by one": plan_one_by_one}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", default="planning-benchmark", help="for what is generated, 5 GB; kept for the next time"
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[20_000, 200_000, mixture_shape.MIXTURE_SIZE])
    parser.add_argument("--one-by-one", type=int, nargs="*", default=[20_000], help="sizes to plan the former way too")
    parser.add_argument("--tokenisers", action="store_true", help="compare ways to tokenise instead")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
