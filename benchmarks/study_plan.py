"""Dry run of a shipped study over an index of 600,000 images: `python benchmarks/study_plan.py`.

The study is a file of jobs/runs/ as it is, the 34 variants of ablations.yaml if none is named; only paths are replaced.
Models have real sizes and random weights: CLIP ViT-L/14-336, and a language model of TinyLlama's shape. Samples and index
are generated, see `mixture_shape`; benchmark files too. The command runs twice: the first run reads and keeps the annotation
files' records, as cache_features does before any study starts.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import mixture_shape
import pyarrow as pa
import torch
from side_by_side import print_table
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from meteor import storage
from meteor.cache.table import table_bytes
from meteor.config import load_run
from meteor.synthetic.benchmarks import write_benchmarks

_CLIP = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
_LLM = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", default="study-plan-benchmark", help="folder of what is generated, 6 GB; kept")
    parser.add_argument("--samples", type=int, default=mixture_shape.MIXTURE_SIZE, help="samples of stage 2")
    parser.add_argument(
        "--captions", type=int, default=220_000, help="samples of stage 1, each with an image of its own"
    )
    parser.add_argument("--run", default="ablations", help="name of the study's run file")
    options = parser.parse_args()
    folder = Path(options.folder).absolute()
    num_images = prepare(folder, options.samples, options.captions)
    overrides = [
        f"output={folder}/out",
        f"data.roots={{'': {folder}/images}}",
        f"data.pretrain={folder}/captions-{options.captions}.json",
        f"data.finetune={folder}/{options.samples}.json",
        f"vision.path={folder}/clip",
        f"llm.path={folder}/llm",
        f"cache.uri={folder}/cache",
        *(f"data.evaluate.{name}.path={folder}/benchmarks/{name}" for name in load_run(options.run).data.evaluate),
    ]
    rows = []
    for start in ("first", "again"):
        command = [
            sys.executable,
            "-m",
            "pipelines.ablate",
            "--run",
            options.run,
            "--dry-run",
            *overrides,
        ]
        began = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append([start, f"{num_images:,}", f"{time.perf_counter() - began:.1f} s"])
        if start == "again":
            print(done.stdout)
    print_table(["dry run", "images in the index", "wall"], rows)


def prepare(folder: Path, num_samples: int, num_captions: int) -> int:
    """Write what is not there yet; return the number of images in the index."""
    folder.mkdir(parents=True, exist_ok=True)
    paragraphs = mixture_shape.corpus()
    if not (folder / "llm").exists():
        mixture_shape.make_tokenizer(folder / "llm", paragraphs)
    if not (folder / "llm/model.safetensors").exists():
        torch.manual_seed(0)
        LlamaForCausalLM(_LLM).to(torch.bfloat16).save_pretrained(folder / "llm")
    if not (folder / "clip").exists():
        CLIPVisionModel(_CLIP).save_pretrained(folder / "clip")
        normalisation = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
        (folder / "clip/preprocessor_config.json").write_text(json.dumps(normalisation))
    if not (folder / "benchmarks").exists():
        write_benchmarks(folder / "benchmarks", num_scenes=8, seed=0)
    file, captions = folder / f"{num_samples}.json", folder / f"captions-{num_captions}.json"
    if not file.exists():
        mixture_shape.write_records(file, mixture_shape.make_records(num_samples, paragraphs))
    if not captions.exists():
        mixture_shape.write_records(captions, make_captions(num_captions))
    index = folder / "cache/index/v00000001.parquet"
    names = {
        record["image"] for path in (file, captions) for record in json.loads(path.read_text()) if "image" in record
    }
    if not index.exists():
        storage.write_bytes(str(index), table_bytes(mixture_shape.make_index(pa.array(sorted(names), pa.string()))))
    return len(names)


def make_captions(count: int):  # type: ignore[no-untyped-def]
    """Samples of stage 1: an image and a caption."""
    for number in range(count):
        turns = [
            {"from": "human", "value": "Describe the image concisely.\n<image>"},
            {"from": "gpt", "value": f"caption number {number} of a generated image"},
        ]
        yield {"id": f"{number:09d}", "image": f"GCC_train_{number:09d}.jpg", "conversations": turns}


if __name__ == "__main__":
    main()
