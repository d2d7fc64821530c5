"""Adapters: where they are, that they start as nothing, resume, and end merged or in peft's own format."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from saving import save_checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from meteor.checkpoint.folder import complete_checkpoints
from meteor.checkpoint.format import Checkpoint
from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.errors import SettingsError
from meteor.text.tokens import TokenisedSample
from meteor.train.build import checkpoint_activations, freeze_for
from meteor.train.engine import make_engine
from meteor.train.export import LLM_PREFIX, export_adapter
from meteor.train.lora import Lora, add_lora, merge_lora
from meteor.train.protocol import load_weights

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
LORA = Lora(rank=4, alpha=8, dropout=0.25, seed=3)


@pytest.fixture
def make_adapted(make_model):
    def make(lora=LORA, attention="sdpa"):
        model = make_model()
        model.language_model.set_attn_implementation(attention)
        freeze_for(model, "finetune")
        add_lora(model.language_model, lora)
        return model

    return make


@pytest.fixture
def batch(make_features, make_batch):
    """A sample with an image, and one of text alone."""
    samples = []
    for i in range(2):
        images = [make_features(f"k{i}", sliced=True, seed=i)] if i == 0 else []
        ids = [1, *[IMAGE_PLACE] * len(images), 10 + i, 20 + i, 30 + i, 2]
        samples.append((TokenisedSample(ids, [IGNORE_INDEX] * (len(ids) - 3) + ids[-3:]), images))
    return make_batch(samples, rows=[[0, 1]])


def trained(model):
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def train(model, batch, steps, checkpoint=None):
    engine = make_engine(
        model,
        zero_stage=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_grad_norm=1.0,
        empty_inputs={},
        checkpoint=checkpoint,
    )
    model.train()
    for step in steps:
        torch.manual_seed(step)  # as the loop does
        engine.forward_backward({**batch.as_inputs(), "num_items_in_batch": 6}, last=True)
        engine.step(lr=1e-2)
    return engine


def test_every_linear_layer_but_the_output_has_an_adapter_and_nothing_else_of_the_llm_trains(make_adapted):
    names = trained(make_adapted())
    linears = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    linears += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    expected = {
        f"language_model.model.layers.{layer}.{linear}.lora_{letter}.default.weight"
        for layer in range(2)
        for linear in linears
        for letter in "AB"
    }
    assert {name for name in names if name.startswith("language_model.")} == expected
    assert any(name.startswith("projector.") for name in names)


def test_adapters_of_vicuna_7b_are_counted_by_hand():
    config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model.requires_grad_(False)
        add_lora(model, Lora(rank=128, alpha=256, dropout=0.0, seed=0))
    # Four of 4096 x 4096, three between 4096 and 11008.
    expected = 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert sum(one.numel() for one in model.parameters() if one.requires_grad) == expected == 319_815_680


@torch.no_grad()
def test_at_first_nothing_changes_and_the_seed_decides_about_the_rest(make_adapted, make_model, batch):
    inputs = {**batch.as_inputs(), "labels": None}
    plain, adapted = make_model().eval(), make_adapted().eval()
    assert torch.equal(adapted(**inputs).logits, plain(**inputs).logits)
    again, other = make_adapted(), make_adapted(replace(LORA, seed=4))
    name = "language_model.model.layers.1.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(again.state_dict()[name], adapted.state_dict()[name])
    assert not torch.equal(other.state_dict()[name], adapted.state_dict()[name])


def test_every_batch_touches_every_adapter(make_adapted, make_batch, batch):
    for one in (batch, make_batch([])):
        model = make_adapted()
        model(**one.as_inputs(), num_items_in_batch=6).loss.backward()
        assert [name for name, parameter in trained(model).items() if parameter.grad is None] == []


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_a_resumed_stage_equals_an_uninterrupted_one_bit_for_bit_dropout_included(
    make_adapted, batch, tmp_path, attention
):
    straight, resumed = make_adapted(attention=attention), make_adapted(attention=attention)
    for model in (straight, resumed):
        checkpoint_activations(model)
    engine = train(straight, batch, range(3))
    save_checkpoint(engine, str(tmp_path), 3, keep=1)
    checkpoint = Checkpoint(complete_checkpoints(str(tmp_path))[-1])
    assert checkpoint.shapes.keys() == trained(straight).keys()
    train(straight_again := make_adapted(attention=attention), batch, range(3, 6), checkpoint)
    # The same engine goes on.
    for step in range(3, 6):
        torch.manual_seed(step)
        engine.forward_backward({**batch.as_inputs(), "num_items_in_batch": 6}, last=True)
        engine.step(lr=1e-2)
    for name, expected in straight.state_dict().items():
        assert torch.equal(straight_again.state_dict()[name], expected), name


@pytest.fixture
def finished(make_adapted, batch, tmp_path):
    model = make_adapted()
    save_checkpoint(train(model, batch, range(3)), str(tmp_path / "checkpoints"), 3, keep=1)
    return model.eval(), Checkpoint(complete_checkpoints(str(tmp_path / "checkpoints"))[-1])


@torch.no_grad()
def test_merged_adapters_answer_as_before(make_adapted, make_model, batch, finished):
    model, checkpoint = finished
    merged = make_adapted()
    load_weights(merged, checkpoint)
    merge_lora(merged.language_model, checkpoint, LORA, prefix=LLM_PREFIX)
    assert merged.state_dict().keys() == make_model().state_dict().keys()
    inputs = {**batch.as_inputs(), "labels": None}
    expected = model(**inputs).logits
    torch.testing.assert_close(merged.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert (make_model().eval()(**inputs).logits - expected).abs().max() > 1e-2


@torch.no_grad()
def test_peft_reads_the_adapter_folder(make_adapted, make_model, batch, finished, tmp_path):
    from peft import PeftModel

    # peft asks transformers for what is called otherwise from 5.20 on.
    warnings.simplefilter("ignore", FutureWarning)
    model, checkpoint = finished
    make_model().language_model.save_pretrained(tmp_path / "llm")
    export_adapter(make_adapted(), checkpoint, LORA, str(tmp_path / "llm"), str(tmp_path / "adapter"))
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "projector.safetensors"
    }  # fmt: skip
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 4
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[1, 10, 20, 30, 2]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model.language_model(input_ids=ids).logits)


def test_a_model_without_linear_layers_is_refused(make_model):
    model = make_model().language_model
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(SettingsError, match="LlamaForCausalLM has no linear layers to adapt"):
        add_lora(model, LORA)
