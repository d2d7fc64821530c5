"""Encoding speed on a GPU, without Ray: `python benchmarks/encoding_gpu.py` (`--tiny` tries the script on a CPU).

The encoder is CLIP ViT-L/14-336 with random weights in bfloat16. The image sizes are mixed like those of LLaVA's data. Printed
are sub-images per second, TFLOP/s and their share of this device's bfloat16 matrix product, memory, and the ratios between

- packed: `FrozenEncoder.encode` with pixels that are on the device already;
- packed from bytes: `FrozenEncoder.encode` from uint8 in the CPU's memory, uploaded and normalised on the device;
- grouped sdpa: transformers' tower with sdpa, in groups of all sub-images of a batch with equal size;
- usual way: transformers' tower with eager attention of all blocks, one image at a time (LLaVA-UHD, VisionZip).
"""

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from meteor.constants import CLIP_MEAN, CLIP_STD
from meteor.image.slicing import plan_slices
from meteor.image.transform import normalise_batch
from meteor.vision.encoder import FrozenEncoder

# Width, height and weight of image sizes: COCO and GQA, then documents, book covers, web images and screenshots.
IMAGES = [
    (640, 480, 20), (480, 640, 8), (640, 427, 14), (427, 640, 6), (500, 375, 10), (375, 500, 4), (612, 612, 3),
    (1024, 768, 8), (768, 1024, 5), (1024, 683, 6), (325, 500, 6), (336, 336, 3), (800, 600, 4), (1920, 1080, 2), (400, 100, 1),
]  # fmt: skip
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
LAYER = -2


@dataclass(frozen=True)
class Workload:
    """Sub-images of each image, as uint8 on the CPU and normalised on the device."""

    on_cpu: list[list[np.ndarray]]
    on_device: list[list[torch.Tensor]]

    @property
    def num_sub_images(self) -> int:
        return sum(map(len, self.on_cpu))

    def batches(self, num_images: int) -> Iterator[slice]:
        return (slice(first, first + num_images) for first in range(0, len(self.on_cpu), num_images))


def main() -> None:
    options = read_options()
    device = torch.device("cpu" if options.tiny else "cuda")
    dtype = torch.float32 if options.tiny else torch.bfloat16
    config = CLIPVisionConfig(**(TINY if options.tiny else LARGE), image_size=336, patch_size=14)
    towers = {name: make_tower(config, name, device, dtype) for name in ("sdpa", "eager")}
    clip = FrozenEncoder(
        towers["sdpa"], select_layer=LAYER, attention_layers=(LAYER,), digest="none", max_tokens=options.max_tokens
    )
    work = make_workload(options.images, device, dtype)
    few = Workload(work.on_cpu[: options.usual_images], work.on_device[: options.usual_images])
    ways: dict[str, tuple[Callable[[Workload], None], Workload]] = {
        "packed": (lambda given: packed(clip, given, options.batch), work),
        "packed from bytes": (lambda given: packed_from_bytes(clip, given, options.batch), work),
        "grouped sdpa": (lambda given: grouped(towers["sdpa"], given, options.batch), work),
        "usual way": (lambda given: usual(towers["eager"], given), few),
    }
    peak = matmul_peak(device, dtype, 512 if options.tiny else 8192)
    name = "CPU" if options.tiny else torch.cuda.get_device_name()
    sides = sorted({tuple(sub_image.shape[1:]) for image in work.on_device for sub_image in image})
    print(f"{name}, {dtype}, torch {torch.__version__}: matrix product {peak / 1e12:.1f} TFLOP/s")
    print(
        f"{len(work.on_cpu)} images, {work.num_sub_images} sub-images of {len(sides)} sizes, {options.batch} images per batch"
    )
    report(measure(ways, options.rounds, device), work, few, config, peak)
    print(f"tokens at once: {clip.max_tokens}")


def measure(
    ways: dict[str, tuple[Callable[[Workload], None], Workload]], rounds: int, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Measure median seconds, and peak gigabytes beyond towers and pixels, in interleaved rounds after a warm-up."""
    seconds: dict[str, list[float]] = defaultdict(list)
    gigabytes: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, (run, work) in ways.items():
            before = start_watching(device)
            started = time.perf_counter()
            run(work)
            synchronise(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
            gigabytes[name] = (torch.cuda.max_memory_allocated() - before) / 1e9 if device.type == "cuda" else 0.0
    return {name: (statistics.median(taken), gigabytes[name]) for name, taken in seconds.items()}


def report(
    measured: dict[str, tuple[float, float]], work: Workload, few: Workload, config: CLIPVisionConfig, peak: float
) -> None:
    rates = {}
    for name, (seconds, gigabytes) in measured.items():
        given = few if name == "usual way" else work
        rates[name] = given.num_sub_images / seconds
        flops = sum(needed_flops(sub_image, config) for image in given.on_device for sub_image in image) / seconds
        print(
            f"{name:<18} {rates[name]:8.1f} sub-images/s  {flops / 1e12:7.2f} TFLOP/s  {flops / peak:6.1%} of the product"
            f"  {gigabytes:6.2f} GB"
        )
    for name in ("usual way", "grouped sdpa", "packed from bytes"):
        print(f"packed / {name}: {rates['packed'] / rates[name]:.2f}")


@torch.inference_mode()
def packed(clip: FrozenEncoder, work: Workload, batch: int) -> None:
    for part in work.batches(batch):
        clip.encode([sub_image for image in work.on_device[part] for sub_image in image])


@torch.inference_mode()
def packed_from_bytes(clip: FrozenEncoder, work: Workload, batch: int) -> None:
    for part in work.batches(batch):
        sub_images = [sub_image for image in work.on_cpu[part] for sub_image in image]
        clip.encode(normalise_batch(sub_images, clip.mean, clip.std, device=clip.device, dtype=clip.dtype))


@torch.inference_mode()
def grouped(tower: CLIPVisionModel, work: Workload, batch: int) -> None:
    for part in work.batches(batch):
        by_size: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for image in work.on_device[part]:
            for sub_image in image:
                by_size[sub_image.shape].append(sub_image)
        for equal in by_size.values():
            states = tower(torch.stack(equal), interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
            _ = states[LAYER][:, 1:]


@torch.inference_mode()
def usual(tower: CLIPVisionModel, work: Workload) -> None:
    for image in work.on_device:
        # The global view and the slices differ in size and cannot share a batch.
        for equal in filter(None, (image[:1], image[1:])):
            given = {"interpolate_pos_encoding": True, "output_hidden_states": True, "output_attentions": True}
            output = tower(torch.stack(equal), **given)
            _ = output.hidden_states[LAYER][:, 1:], output.attentions[LAYER][:, :, 0, 1:].mean(1)


def make_tower(config: CLIPVisionConfig, attention: str, device: torch.device, dtype: torch.dtype) -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel._from_config(config, attn_implementation=attention).eval().to(device=device, dtype=dtype)


def make_workload(num_images: int, device: torch.device, dtype: torch.dtype) -> Workload:
    chosen = random.Random(0).choices(IMAGES, weights=[share for _, _, share in IMAGES], k=num_images)
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    on_cpu = []
    for width, height, _ in chosen:
        grids = plan_slices(width, height).patch_grids
        on_cpu.append([np.ascontiguousarray(noise[: rows * 14, : columns * 14]) for rows, columns in grids])
    on_device = [normalise_batch(shown, CLIP_MEAN, CLIP_STD, device=device, dtype=dtype) for shown in on_cpu]
    return Workload(on_cpu, on_device)


def needed_flops(pixels_3HW: torch.Tensor, config: CLIPVisionConfig) -> float:
    """Return the FLOPs of a sub-image up to the selected layer, which every way must compute."""
    num_patches = pixels_3HW.shape[1] * pixels_3HW.shape[2] // 14**2
    tokens, width, inner = num_patches + 1, config.hidden_size, config.intermediate_size
    block = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    return (config.num_hidden_layers + 1 + LAYER) * block + 2 * num_patches * 3 * 14**2 * width


def matmul_peak(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Measure the FLOP/s of the fastest of many square matrix products."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(5):
            left @ right
        synchronise(device)
        best = min(best, (time.perf_counter() - started) / 5)
    return 2 * side**3 / best


def start_watching(device: torch.device) -> int:
    """Reset the peak memory statistics and return the bytes in use."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    synchronise(device)
    return torch.cuda.memory_allocated()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny tower in float32 on the CPU")
    parser.add_argument("--images", type=int, default=None, help="number of images (384; 6 with --tiny)")
    parser.add_argument("--usual-images", type=int, default=48, help="number of images that the usual way encodes")
    parser.add_argument("--batch", type=int, default=32, help="number of images that are encoded together")
    parser.add_argument("--max-tokens", type=int, default=None, help="most tokens per pass (default: by free memory)")
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    options = parser.parse_args()
    options.images = options.images or (6 if options.tiny else 384)
    return options


if __name__ == "__main__":
    main()
