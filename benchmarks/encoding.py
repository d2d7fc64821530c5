"""Encoding pass of cache_features against a bare encoder loop over equal images: `python benchmarks/encoding.py`.

Both use one encoder thread, and a CLIP large enough to make the encoder the bottleneck. The bare loop holds sliced images in
memory and discards the features. The pass reads files, decodes, slices, encodes, writes features and publishes them. Two ratios
are printed: the steady rate from the first finished batch, and the rate from the call to the last commit, which includes
starting processes and loading the model. Rounds are interleaved.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from meteor.assembly import cache_identity, load_encoder, pixel_settings
from meteor.cache import FeatureCache, IndexRow, create_cache
from meteor.config import RunSettings
from meteor.image.pixels import SlicedImage, slice_bytes
from meteor.vision.encode_images import encode_each
from pipelines.ray_parts.encoding import encode_missing
from pipelines.ray_parts.live_metrics import LiveMetrics
from pipelines.ray_parts.logs import configure_logging
from pipelines.ray_parts.runtime import ray_session

SIZES = [(1000, 700), (640, 480), (700, 1000), (1280, 960), (500, 375), (480, 640)]


def main() -> None:
    options = read_options()
    # Set before Ray starts, so that its workers inherit the variable.
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ray gives its workers a lower priority by default, which the bare loop does not have.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (Ray spells it so)
    torch.set_num_threads(1)
    configure_logging()
    with tempfile.TemporaryDirectory() as folder:
        settings = make_run(Path(folder), options)
        rows = make_images(Path(folder) / "images", options.images)
        sliced = [slice_bytes(Path(row.uri).read_bytes(), row.image_key, pixel_settings(settings)) for row in rows]
        num_sub_images = sum(len(image.sub_images) for image in sliced)
        print(
            f"{len(rows)} images, {num_sub_images} sub-images, {options.width} wide, {options.layers} blocks, 1 thread"
        )
        with ray_session(settings.runtime):
            ratios = [run_round(settings, rows, sliced, number) for number in range(options.rounds)]
    steady, total = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"pipeline / bare loop, median of {options.rounds}: steady {steady:.2f}, with start and end {total:.2f}")


def run_round(
    settings: RunSettings, rows: list[IndexRow], sliced: list[SlicedImage], number: int
) -> tuple[float, float]:
    """Measure the pass's rate relative to the bare loop's: steady, and from start to end."""
    num_sub_images = sum(len(image.sub_images) for image in sliced)
    encoder = load_encoder(settings)
    batch_size = settings.cache.rows_per_file
    encode_each(sliced[:1], encoder)
    started = time.perf_counter()
    for first in range(0, len(sliced), batch_size):
        encode_each(sliced[first : first + batch_size], encoder)
    bare_s = time.perf_counter() - started
    identity = cache_identity(settings, encoder)
    cache_uri = create_cache(f"{settings.output}/round-{number}", identity, settings.cache.codec)
    del encoder
    started = time.perf_counter()
    counts = encode_missing(
        settings,
        cache_uri,
        {row.image_key: row for row in rows},
        LiveMetrics("bench", "", ""),
        check_claim=lambda: None,
    ).counts()
    total_s = time.perf_counter() - started
    assert len(FeatureCache.open(cache_uri)) == len(rows)
    bare = num_sub_images / bare_s
    steady, total = counts["sub_images_per_s"] / bare, num_sub_images / total_s / bare
    print(
        f"round {number}: bare {bare:.2f} sub-images/s (a batch takes {bare_s / len(sliced) * batch_size:.2f} s), "
        f"pipeline {counts['sub_images_per_s']:.2f} ({steady:.2f}), start to end {num_sub_images / total_s:.2f} "
        f"({total:.2f}), encoder busy {counts['encoder_busy_share']:.0%}",
        flush=True,
    )
    return steady, total


def make_run(folder: Path, options: argparse.Namespace) -> RunSettings:
    config = CLIPVisionConfig(
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        image_size=336,
        patch_size=14,
    )
    torch.manual_seed(0)
    CLIPVisionModel(config).save_pretrained(folder / "clip")
    (folder / "clip/preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return RunSettings.model_validate(
        {
            "output": str(folder / "out"),
            "vision": {"path": str(folder / "clip"), "dtype": "float32"},
            "cache": {"rows_per_file": options.rows_per_file},
            "runtime": {"cpus_per_encoder": 1},
        }
    )


def make_images(folder: Path, num_images: int) -> list[IndexRow]:
    """Write JPEG images of coarse noise, because fine noise would take longer to decode than photographs."""
    folder.mkdir()
    rows = []
    for number in range(num_images):
        width, height = SIZES[number % len(SIZES)]
        noise = np.random.default_rng(number).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        file = folder / f"{number}.jpg"
        Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, quality=90)
        data = file.read_bytes()
        key = hashlib.sha256(data).hexdigest()
        rows.append(IndexRow(file.name, str(file), len(data), "", key, width, height, "ok"))
    return sorted(rows, key=lambda row: row.image_key)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=72, help="number of images (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="width of the encoder (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the encoder (default: %(default)s)")
    parser.add_argument("--rows-per-file", type=int, default=4, help="images per batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
