"""The memory plan: exact counts of parameters, real tensors of the plain engine, and DeepSpeed's stages by hand."""

from dataclasses import replace

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from meteor.planning.activations import LayerBytes
from meteor.planning.memory import Setup, estimate_memory
from meteor.planning.sizes import BatchSizes, ModelSizes, find_model_sizes
from meteor.train.build import freeze_for
from meteor.train.engine import make_engine

CLIP_LARGE = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}


def find(llm, stage="finetune", **changes):
    options = {"dtype": torch.bfloat16, "live": False, **changes}
    return find_model_sizes(LlamaConfig(vocab_size=32000, **llm), CLIP_LARGE, {"name": "mlp"}, stage, **options)


@pytest.mark.parametrize(("llm", "expected"), [(LLAMA_7B, 6_738_415_616), (LLAMA_13B, 13_015_864_320)])
def test_vicunas_parameters_are_counted_to_the_last(llm, expected):
    projector = 1024 * llm["hidden_size"] + llm["hidden_size"] + llm["hidden_size"] * (llm["hidden_size"] + 1)
    stage_1, stage_2 = find(llm, "pretrain"), find(llm)
    assert (stage_1.trained, stage_1.frozen, stage_1.head_trained) == (projector, expected, False)
    assert (stage_2.trained, stage_2.frozen, stage_2.head_trained) == (projector + expected, 0, True)


def test_a_live_encoder_is_counted_and_a_cached_one_is_not():
    small = {**LLAMA_7B, "num_hidden_layers": 1}
    # 24 blocks of 12.6 M, embeddings of patches and positions.
    assert find(small, live=True).encoder == pytest.approx(303.5e6, rel=0.01)
    assert find(small).encoder == 0


SIZES = ModelSizes(
    trained=8_000_000_000,
    frozen=400_000_000,
    encoder=0,
    num_layers=4,
    sub_image_bytes=100,
    width=5,
    vocabulary=11,
    head_trained=True,
)
BATCH = BatchSizes(LayerBytes(layer=1000, layer_input=10, around=7), num_sub_images=3, num_answer_tokens=6)
SETUP = Setup(num_workers=8, zero_stage=0, element_bytes=2, checkpointing=True, overhead_bytes=0)


def gigabytes(parts):
    return {part: round(size / 1e9, 1) for part, size in parts.items() if size >= 1e8}


def test_the_parts_of_each_zero_stage_by_hand():
    # 8 B trained and 0.4 B frozen parameters in bfloat16 on 8 GPUs; "activations" are the gradients of the masters.
    estimates = {stage: estimate_memory(SIZES, BATCH, replace(SETUP, zero_stage=stage)) for stage in range(4)}
    assert gigabytes(estimates[0].gpu) == {
        "weights": 16.8,
        "gradients": 16.0,
        "masters": 32,
        "moments": 64,
        "activations": 32,
    }
    state = {"masters": 4, "moments": 8, "gathered weights and buckets": 2, "activations": 4}
    assert gigabytes(estimates[1].gpu) == {"weights": 16.8, "gradients": 16.0, **state}
    assert gigabytes(estimates[2].gpu) == {"weights": 16.8, "gradients": 2.0, **state}
    # 8.4 B / 8; and 1.05 B gathered.
    assert gigabytes(estimates[3].gpu) == {
        "weights": 2.1, "gradients": 2.0, **state, "gathered weights and buckets": 4.1
    }  # fmt: skip
    assert {estimate.checkpoint for estimate in estimates.values()} == {96_000_000_000}


def test_what_is_offloaded_is_on_the_host():
    setup = replace(SETUP, zero_stage=3, num_workers=1, offload_optimizer=True)
    estimate = estimate_memory(SIZES, BATCH, setup)
    assert gigabytes(estimate.gpu) == {"weights": 16.8, "gathered weights and buckets": 4.1}
    assert gigabytes(estimate.host) == {"masters": 32, "moments": 64, "gradients": 32}
    estimate = estimate_memory(SIZES, BATCH, replace(setup, offload_param=True))
    assert gigabytes(estimate.gpu) == {"gathered weights and buckets": 4.1}
    assert estimate.host["weights"] == 16_000_000_000


def test_activations_by_hand():
    small = replace(SIZES, trained=1, frozen=1)
    # 6 answers: logits 6 x 11 x (4 + 2 x 2), their gradient 6 x 5 x 2, the output layer's 11 x 5 x (4 + 2).
    rest = 1000 + 7 + 3 * 100 + 528 + 60 + 330
    assert estimate_memory(small, BATCH, SETUP).gpu["activations"] == 4 * 10 + 1000 + rest
    assert estimate_memory(small, BATCH, replace(SETUP, checkpointing=False)).gpu["activations"] == 4 * 1000 + rest


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_engine_holds_what_is_estimated(make_model, make_features, make_batch, dtype, stage):
    model = make_model()
    freeze_for(model, stage)
    engine = make_engine(
        model, zero_stage=0, dtype=dtype, device=torch.device("cpu"), max_grad_norm=1.0, empty_inputs={}
    )
    engine.forward_backward({**make_batch([]).as_inputs(), "num_items_in_batch": 1}, last=True)
    gradients = sum(one.grad.nbytes for one in model.parameters() if one.grad is not None)
    engine.step(lr=0.0)
    counts = {
        wanted: sum(p.numel() for p in model.parameters() if p.requires_grad == wanted) for wanted in (True, False)
    }
    sizes = replace(SIZES, trained=counts[True], frozen=counts[False])
    estimated = estimate_memory(sizes, BATCH, replace(SETUP, num_workers=1, element_bytes=dtype.itemsize)).gpu
    assert estimated["weights"] == sum(one.nbytes for one in model.parameters())
    assert estimated["gradients"] == gradients
    held = {part.data_ptr(): part.nbytes for part in (one.values for one in engine.fragments())}
    own_weights = {one.data_ptr() for one in model.parameters()}
    assert estimated.get("masters", 0) + estimated["moments"] == sum(
        size for pointer, size in held.items() if pointer not in own_weights
    )
