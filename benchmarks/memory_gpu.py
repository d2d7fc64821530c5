"""Planned memory against measured memory on a GPU: `python benchmarks/memory_gpu.py` (`--tiny` tries the script on a CPU).

Models have Llama's shapes and random weights; plain torch trains them on one GPU, on packed rows without padding. For each
shape, with and without activation checkpointing, the plan is compared with `torch.cuda.max_memory_allocated` after a step. The
plan's allowance for CUDA's context is left out, because the measurement does not include it.
"""

import argparse
import gc
from dataclasses import replace

import torch
from side_by_side import print_table
from train_work import SHAPES, make_model

from meteor.constants import IGNORE_INDEX
from meteor.data.collate import Batch
from meteor.planning.activations import count_layer_bytes
from meteor.planning.memory import Setup, estimate_memory
from meteor.planning.sizes import BatchSizes, find_model_sizes
from meteor.train.build import checkpoint_activations, freeze_for
from meteor.train.engine import make_engine

# Default of MeteorConfig: the id of <image> behind Vicuna's vocabulary.
IMAGE_ID = 32000


def main() -> None:
    options = read_options()
    device = torch.device("cpu" if options.tiny else "cuda")
    dtype = torch.float32 if options.tiny else torch.bfloat16
    print(f"{'CPU' if options.tiny else torch.cuda.get_device_name()}, torch {torch.__version__}, {dtype}\n")
    rows = []
    for shape in ["tiny"] if options.tiny else options.shapes:
        for stage in ("pretrain", "finetune"):
            for checkpointing in (True, False):
                rows.append(
                    [
                        shape,
                        stage,
                        "yes" if checkpointing else "no",
                        *measure(shape, stage, checkpointing, options, device, dtype),
                    ]
                )
                gc.collect()
                torch.cuda.empty_cache()
    parts = [f"{part}: estimated / measured" for part in ("state, GB", "peak of a step, GB")]
    print_table(["shape", "stage", "checkpointing", *parts, "ratio of the peaks"], rows)


def measure(
    shape: str, stage: str, checkpointing: bool, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> list[str]:
    """Plan and measure the state between steps and the peak of a step, in bytes."""
    projector = {"name": "meteor", "k": options.k}
    model = make_model(shape, projector, device, dtype)
    model.vision_tower = None
    freeze_for(model, stage)
    if checkpointing:
        checkpoint_activations(model)
    model.language_model.set_attn_implementation("varlen" if device.type == "cuda" else "sdpa")
    batch = make_batch(options, model.config.vision_config.hidden_size, dtype)
    engine = make_engine(model, zero_stage=0, dtype=dtype, device=device, max_grad_norm=1.0, empty_inputs={})
    inputs = {**batch.to(device).as_inputs(), "num_items_in_batch": 1000}
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        engine.forward_backward(inputs, last=True)
        engine.step(lr=0.0)
    measured_state, measured_peak = (
        (torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
        if device.type == "cuda"
        else (0, 0)
    )
    sizes = find_model_sizes(
        model.config.text_config, model.config.vision_config, projector, stage, dtype=dtype, live=False
    )
    layers = count_layer_bytes(
        model.config.text_config,
        dtype=dtype,
        rows=options.rows,
        length=options.length,
        attention="varlen",
        trained=stage == "finetune",
    )
    num_answers = int((batch.labels != IGNORE_INDEX).sum())
    estimate = estimate_memory(
        sizes,
        BatchSizes(layers, num_sub_images=len(batch.grids), num_answer_tokens=num_answers),
        replace(Setup(1, 0, dtype.itemsize, checkpointing), overhead_bytes=0),
    )
    state = sum(estimate.gpu.get(part, 0) for part in ("weights", "masters", "moments"))
    pairs = [(state, measured_state), (estimate.gpu_total, measured_peak)]
    cells = [f"{estimated / 1e9:.2f} / {measured / 1e9:.2f}" for estimated, measured in pairs]
    return [*cells, f"{estimate.gpu_total / measured_peak:.2f}" if measured_peak else "-"]


def make_batch(options: argparse.Namespace, vision_width: int, dtype: torch.dtype) -> Batch:
    """Make full rows: half visual tokens (sub-images of 24 x 24 patches), a quarter questions, a quarter answers."""
    per_row = max(options.length // 2 // options.k, 1)
    num_visual = per_row * options.k
    ids_BL = torch.randint(3, 1000, (options.rows, options.length))
    ids_BL[:, 1 : 1 + num_visual] = IMAGE_ID
    labels_BL = ids_BL.clone()
    labels_BL[:, : (options.length + num_visual) // 2] = IGNORE_INDEX
    num_sub_images = options.rows * per_row
    return Batch(
        input_ids=ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        labels=labels_BL,
        turns=torch.zeros_like(ids_BL),
        image_numbers=torch.zeros_like(ids_BL),
        features=torch.randn(num_sub_images, 576, vision_width).to(dtype),
        cls_attention=torch.rand(num_sub_images, 576) / 576,
        grids=torch.tensor([[24, 24]] * num_sub_images),
        num_slots=torch.full((num_sub_images,), options.k),
        num_samples=options.rows,
    )


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use a tiny model on a CPU, to try the script")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "7b"], help="shapes of models")
    parser.add_argument("--rows", type=int, default=2, help="rows per micro batch (2)")
    parser.add_argument("--length", type=int, default=2048, help="tokens per row (2048)")
    parser.add_argument("--k", type=int, default=144, help="tokens per sub-image (144)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
