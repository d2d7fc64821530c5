"""The count of model FLOPs against the operations that torch counts, and the peaks of devices by their names."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.text.tokens import TokenisedSample
from meteor.train.build import checkpoint_activations, freeze_for
from meteor.train.flops import ModelFlops, peak_flops

NUM_SAMPLES, NUM_PATCHES, NUM_ANSWERS = 3, 8, 5


@pytest.fixture
def measured(make_model, make_features, make_batch):
    """FLOPs of a pass over three samples of equal length, as torch counts them; and the model."""

    def measure(stage, *, checkpointing=False):
        # Grouped queries, and heads that together are wider than the model.
        shape = {"num_key_value_heads": 2, "head_dim": 16}
        model = make_model({"name": "mlp"}, hidden_size=48, intermediate_size=80, num_hidden_layers=3, **shape)
        model.language_model.set_attn_implementation("eager")
        freeze_for(model, stage)
        if checkpointing:
            checkpoint_activations(model)
        answer = [7] * NUM_ANSWERS
        text = [1, IMAGE_PLACE, *[9] * 20, *answer]
        labels = [IGNORE_INDEX] * 22 + answer
        samples = [(TokenisedSample(text, labels), [make_features(f"k{i}")]) for i in range(NUM_SAMPLES)]
        batch = make_batch(samples, {"name": "mlp"})
        with FlopCounterMode(display=False) as counter:
            model(**batch.as_inputs(), skip_logits=True).loss.backward()
        return counter.get_total_flops(), model, batch.input_ids.shape[1]

    return measure


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_count_is_what_torch_counts(measured, stage):
    total, model, length = measured(stage)
    flops = ModelFlops.of(model, peak=1.0)
    counted = flops.count(
        num_tokens=length * NUM_SAMPLES,
        num_squares=length**2 * NUM_SAMPLES,
        num_visual_tokens=NUM_PATCHES * NUM_SAMPLES,
        num_answer_tokens=NUM_ANSWERS * NUM_SAMPLES,
    )
    # Eager attention computes the half above the diagonal too, and nobody needs the gradient of the features.
    counted += flops.per_squared_length * NUM_SAMPLES * length**2
    counted -= 2 * 16 * 48 * NUM_PATCHES * NUM_SAMPLES
    # What is left is the angles of the rotary embedding.
    assert counted == pytest.approx(total, rel=1e-3)


def test_a_frozen_language_model_costs_two_thirds(measured):
    (_, model, _), frozen = measured("finetune"), ModelFlops.of(measured("pretrain")[1], peak=1.0)
    trained = ModelFlops.of(model, peak=1.0)
    assert frozen.per_token == trained.per_token * 4 / 6
    assert frozen.per_answer_token == trained.per_answer_token * 4 / 6
    assert frozen.per_visual_token == trained.per_visual_token
    assert frozen.per_squared_length == trained.per_squared_length == 6 * 3 * 64


def test_activations_that_are_computed_again_count_once(measured):
    total, model, _ = measured("finetune")
    again, checkpointed, _ = measured("finetune", checkpointing=True)
    assert again > total * 1.2
    assert ModelFlops.of(checkpointed, peak=1.0) == ModelFlops.of(model, peak=1.0)


def test_matrices_that_zero_3_has_cut_up_count_whole(make_model):
    model = make_model({"name": "mlp"})
    whole = ModelFlops.of(model, peak=1.0)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert ModelFlops.of(model, peak=1.0) == whole


def test_tied_embeddings_count_as_the_output_layer_alone(make_model):
    tied = ModelFlops.of(make_model({"name": "mlp"}, tie_word_embeddings=True), peak=1.0)
    assert tied == ModelFlops.of(make_model({"name": "mlp"}), peak=1.0)


def test_vicuna_7b_has_its_published_shape():
    """By hand: 32 layers of 4 x 4096^2 + 3 x 4096 x 11008 weights, 32,000 x 4096 in the output layer."""
    with torch.device("meta"):
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
        llm = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **shape))
        model = SimpleNamespace(language_model=llm, projector=torch.nn.Linear(1024, 4096))
    flops = ModelFlops.of(model, peak=1.0)
    assert flops.per_token == 6 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) == 6 * 6_476_005_376
    assert flops.per_answer_token == 6 * 32_000 * 4096
    counted = flops.count(num_tokens=2048, num_squares=2048**2, num_visual_tokens=0, num_answer_tokens=0)
    assert counted == 6 * 6_476_005_376 * 2048 + 6 * 32 * 4096 * 2048**2


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100X of some other kind", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_known_by_the_device_s_name(name, tflops):
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)
