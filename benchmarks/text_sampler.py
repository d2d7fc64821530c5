"""Savings by the text-guided sampler: `python benchmarks/text_sampler.py` (small LLM, CPU), `--shape 7b` on a GPU.

A language model with random weights processes a prompt of seven sub-images and a question, without a sampler and with samplers
that keep 0.75 and 0.25 of the visual tokens after half of the layers. The prompt's pass, the pass with 32 new tokens, and a
training step's forward and backward pass are timed in turn. Times are medians; ratios are relative to the model without a
sampler.
"""

import argparse
from functools import partial
from typing import Any

import torch
from fusion import place
from side_by_side import compare, format_seconds, print_table
from transformers import CLIPVisionConfig, LlamaConfig

from meteor.constants import IGNORE_INDEX
from meteor.model import MeteorConfig, MeteorForConditionalGeneration

SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
SUB_IMAGES, K, NUM_WORDS, NUM_ANSWER, NEW_TOKENS = 7, 144, 40, 40, 32

# Default of MeteorConfig: the id of <image> behind Vicuna's vocabulary.
IMAGE_ID = 32000


def main() -> None:
    options = read_options()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape, k = SHAPES[options.shape], 8 if options.tiny else K
    inputs = {name: value.to(device) for name, value in make_inputs(k).items()}
    inputs["features"] = inputs["features"].to(dtype)
    models = {}
    for name, keep in (("none", None), ("keep 0.75", 0.75), ("keep 0.25", 0.25)):
        sampler = keep and {"layer": shape["num_hidden_layers"] // 2, "keep": keep}
        models[name] = make_model(shape, k, sampler, device, dtype)
    rows = []
    tasks: dict[str, Any] = {
        "prompt": partial(answer, inputs, 1),
        "prompt and 32 tokens": partial(answer, inputs, NEW_TOKENS),
    }
    tasks["training, forward and backward"] = partial(train, inputs)
    for task, run in tasks.items():
        figures = compare({name: partial(run, model) for name, model in models.items()}, device, options.rounds)
        rows += [
            [task, name, format_seconds(figure.seconds), f"{figure.seconds / figures['none'].seconds:.2f}"]
            for name, figure in figures.items()
        ]
    num_visual = SUB_IMAGES * k
    print(f"\n{options.shape}, {num_visual} visual tokens and {NUM_WORDS} words, {dtype}, {place(device)}\n")
    print_table(["", "sampler", "time", "ratio"], rows)


def make_inputs(k: int) -> dict[str, torch.Tensor]:
    num_visual = SUB_IMAGES * k
    words = torch.randint(3, 1000, (1, NUM_WORDS + NUM_ANSWER))
    ids = torch.cat([torch.ones(1, 1, dtype=torch.long), torch.full((1, num_visual), IMAGE_ID), words], dim=1)
    place_L = torch.arange(ids.shape[1])
    visual = (place_L > 0) & (place_L <= num_visual)
    labels = torch.where(place_L > num_visual + NUM_WORDS, ids, IGNORE_INDEX)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "turns": ((place_L > 0) & (place_L <= num_visual + NUM_WORDS)).long()[None],
        "image_numbers": visual.long()[None],
        "features": torch.randn(SUB_IMAGES, 576, 1024),
        "cls_attention": torch.rand(SUB_IMAGES, 576),
        "grids": torch.tensor([[24, 24]] * SUB_IMAGES),
        "num_slots": torch.full((SUB_IMAGES,), k),
    }


def make_model(
    shape: dict[str, int], k: int, sampler: dict[str, Any] | None, device: torch.device, dtype: torch.dtype
) -> MeteorForConditionalGeneration:
    torch.manual_seed(0)
    config = MeteorConfig(
        text_config=LlamaConfig(vocab_size=32000, **shape),
        vision_config=CLIPVisionConfig(hidden_size=1024, num_attention_heads=16, num_hidden_layers=1),
        projector={"name": "visual_topk", "k": k},
        text_sampler=sampler,
    )
    with device:
        model = MeteorForConditionalGeneration(config, vision_tower=False).to(dtype)
    model.language_model.set_attn_implementation("sdpa")
    model.language_model.generation_config.pad_token_id = 0
    return model


def answer(inputs: dict[str, torch.Tensor], new_tokens: int, model: MeteorForConditionalGeneration) -> None:
    end = inputs["input_ids"].shape[1] - NUM_ANSWER
    cut = {"input_ids", "attention_mask", "turns", "image_numbers"}
    prompt = {name: value[:, :end] if name in cut else value for name, value in inputs.items() if name != "labels"}
    model.generate(**prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)


def train(inputs: dict[str, torch.Tensor], model: MeteorForConditionalGeneration) -> None:
    model(**inputs).loss.backward()
    model.zero_grad()


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="size of the LLM (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="number of rounds (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="use few tokens, to try the script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
