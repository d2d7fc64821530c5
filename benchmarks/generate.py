"""Speed of answers: `python benchmarks/generate.py` (small LLM, CPU), or `--device cuda --shape 7b` or `13b` on a GPU.

A language model with random weights answers behind LLaVA-Meteor's projector with K = 144, 64 and 32 tokens per sub-image, and
behind LLaVA-UHD's resampler with 144. The prompt is an image of five sub-images (640 x 480) and a question, alone and in
batches. The prompt's pass (with projector, from ready features) and the following tokens are timed separately, with all
projectors in turn. Printed are medians and ratios to the resampler. The paper's Table 4 reports 28.4 tokens/s for the resampler
and 29.1, 31.3 and 32.9 for Meteor, with Vicuna-13B.
"""

import argparse
import time
from statistics import median
from typing import Any

import torch
from fusion import place
from side_by_side import print_table
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig

from meteor.evaluation.efficiency import TokenTimes
from meteor.model import MeteorConfig, MeteorForConditionalGeneration

SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
PROJECTORS: dict[str, dict[str, Any]] = {
    "resampler, 144": {"name": "resampler", "k": 144},
    "meteor, K = 144": {"name": "meteor", "k": 144},
    "meteor, K = 64": {"name": "meteor", "k": 64},
    "meteor, K = 32": {"name": "meteor", "k": 32},
}
NUM_WORDS = 40

# Default of MeteorConfig: the id of <image> behind Vicuna's vocabulary.
IMAGE_ID = 32000


def main() -> None:
    options = read_options()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = make_models(SHAPES[options.shape], device, dtype)
    rows = []
    for batch in options.batches:
        inputs = {name: make_inputs(PROJECTORS[name]["k"], batch, options.sub_images, device, dtype) for name in models}
        passes: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
        for number in range(options.rounds + 1):
            for name, model in models.items():
                measured = measure(model, inputs[name], options.new_tokens, device)
                if number:  # the first round, which loads kernels and grows the allocator, does not count
                    passes[name].append(measured)
        base: tuple[float, ...] = ()
        for name, measured in passes.items():
            projector_s, first_s, rest_s = (median(column) for column in zip(*measured, strict=True))
            length = inputs[name]["input_ids"].shape[1]
            decode = batch * (options.new_tokens - 1) / rest_s
            base = base or (first_s, decode, first_s + rest_s)
            rows.append(
                [
                    str(batch),
                    name,
                    f"{length:,}",
                    f"{1e3 * first_s:,.0f} ms ({first_s / base[0]:.2f})",
                    f"{1e3 * projector_s:,.0f} ms",
                    f"{batch * length / first_s:,.0f}",
                    f"{decode:,.1f} ({decode / base[1]:.2f})",
                    f"{batch / (first_s + rest_s):,.2f} ({base[2] / (first_s + rest_s):.2f})",
                ]
            )
    print(
        f"\n{options.shape}, {options.sub_images} sub-images, {options.new_tokens} new tokens, {dtype}, {place(device)}\n"
    )
    header = ["batch", "projector", "prompt", "prompt's pass (ratio)", "projector's part", "prefill tokens/s"]
    print_table([*header, "decode tokens/s (ratio)", "answers/s (ratio)"], rows)


@torch.inference_mode()
def measure(
    model: MeteorForConditionalGeneration, inputs: dict[str, torch.Tensor], new_tokens: int, device: torch.device
) -> tuple[float, float, float]:
    """Measure the seconds of the projector alone, of the prompt's pass with it, and of the tokens after the first."""
    synchronise(device)
    started = time.perf_counter()
    model.projector(inputs["features"], inputs["cls_attention"], inputs["grids"], None)
    synchronise(device)
    projected, times = time.perf_counter(), TokenTimes()
    model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, streamer=times)
    return projected - started, times.seconds[0] - projected, times.seconds[-1] - times.seconds[0]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_models(
    shape: dict[str, int], device: torch.device, dtype: torch.dtype
) -> dict[str, MeteorForConditionalGeneration]:
    """Make a model per projector around one shared language model, because a 13B model fits into memory only once."""
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=32000, **shape)
    vision = CLIPVisionConfig(hidden_size=1024, num_attention_heads=16, num_hidden_layers=1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:
        llm = AutoModelForCausalLM.from_config(text, attn_implementation="sdpa")
    torch.set_default_dtype(before)
    llm.generation_config.pad_token_id = 0
    models = {}
    for name, projector in PROJECTORS.items():
        config = MeteorConfig(text_config=text, vision_config=vision, projector=projector)
        model = MeteorForConditionalGeneration(config, vision_tower=False, language_model=llm)
        model.projector.to(device, dtype)
        model.language_model.set_attn_implementation("sdpa")
        models[name] = model.eval()
    return models


def make_inputs(
    k: int, batch: int, sub_images: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    num_visual = sub_images * k
    words = torch.randint(3, 1000, (batch, NUM_WORDS))
    start, visual = torch.ones(batch, 1, dtype=torch.long), torch.full((batch, num_visual), IMAGE_ID)
    ids = torch.cat([start, visual, words], dim=1).to(device)
    count = batch * sub_images
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "features": torch.randn(count, 576, 1024, device=device, dtype=dtype),
        "cls_attention": torch.rand(count, 576, device=device),
        "grids": torch.tensor([[24, 24]] * count, device=device),
        "num_slots": torch.full((count,), k, device=device),
    }


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="size of the LLM (default: %(default)s)")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8], metavar="N", help="batch sizes (default: 1 8)"
    )
    parser.add_argument(
        "--sub-images", type=int, default=5, metavar="N", help="sub-images per image (default: %(default)s)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=33, metavar="N", help="tokens per answer (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="number of rounds (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
