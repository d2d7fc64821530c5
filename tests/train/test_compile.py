"""Compiled decoder layers against the plain ones; the compiler takes its time, so most is in the slow lane."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.errors import SettingsError
from meteor.model.attention import IMPLEMENTATIONS
from meteor.text.tokens import TokenisedSample
from meteor.train.build import checkpoint_activations, compile_layers, freeze_for

ROWS = ([[0, 1], [2]], [[0], [1, 2], [3]], [[3], [2], [1], [0]], [[3, 2, 1, 0]], [])


@pytest.fixture
def make_samples(make_features):
    def make(num=4):
        samples = []
        for i in range(num):
            ids = [1, IMAGE_PLACE, *range(10, 12 + i), 2]
            labels = [IGNORE_INDEX] * 3 + ids[3:]
            samples.append((TokenisedSample(ids, labels), [make_features(f"k{i}", sliced=i % 2 == 0, seed=i)]))
        return samples

    return make


def test_zero_3_and_models_without_layers_are_refused_with_the_reason(make_model):
    with pytest.raises(SettingsError, match="zero_stage 0 to 2"):
        compile_layers(make_model(), zero_stage=3)
    model = make_model()
    model.language_model.model.layers = torch.nn.ModuleList()
    with pytest.raises(SettingsError, match="LlamaForCausalLM has no decoder layers"):
        compile_layers(model, zero_stage=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler imports what torch deprecates
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_compiled_layers_give_the_same_loss_and_gradients_for_every_batch(
    make_model, make_samples, make_batch, attention, checkpointing
):
    plain, compiled = make_model(num_hidden_layers=4), make_model(num_hidden_layers=4)
    for model in (plain, compiled):
        model.language_model.set_attn_implementation(attention)
        freeze_for(model, "finetune")
        if checkpointing:
            checkpoint_activations(model)
    compile_layers(compiled, zero_stage=0)
    samples = make_samples()
    for rows in ROWS:
        inputs = make_batch(samples if rows else [], rows=rows).as_inputs()
        expected, got = (model(**inputs, num_items_in_batch=12).loss for model in (plain, compiled))
        for loss in (expected, got):
            loss.backward()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(
                other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
        plain.zero_grad(), compiled.zero_grad()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_layers_and_all_batches_of_one_kind_of_rows_share_one_graph(make_model, make_samples, make_batch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = make_model(num_hidden_layers=6)
    model.language_model.set_attn_implementation("sdpa")
    freeze_for(model, "finetune")
    compile_layers(model, zero_stage=0, backend=counter)
    samples = make_samples()
    # Rows of several samples have a block mask; with one sample per row the model makes its own mask.
    for rows, num_graphs in zip(ROWS[:3], (1, 1, 2), strict=True):
        model(**make_batch(samples, rows=rows).as_inputs(), num_items_in_batch=12).loss.backward()
        assert counter.frame_count == num_graphs
