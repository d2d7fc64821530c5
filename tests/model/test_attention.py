"""Samples that share a row: none sees another, whatever computes the attention, and the loss is that of each alone."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GraniteConfig, GraniteForCausalLM

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.errors import SettingsError
from meteor.model import MeteorForConditionalGeneration
from meteor.model.attention import IMPLEMENTATIONS, Layout
from meteor.text.tokens import TokenisedSample
from meteor.train.build import checkpoint_activations

V, X = IMAGE_PLACE, IGNORE_INDEX
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
ROWS = [[0, 2, 1], [3], [4, 1]]


@pytest.fixture
def make_samples(make_features):
    def make(changed=None):
        """Five samples; ``changed`` has other words and another image."""
        samples = []
        for i in range(5):
            word = 40 if i == changed else 10 + i
            images = [make_features(f"k{i}", sliced=i == 2, seed=100 if i == changed else i)] if i != 1 else []
            ids = [1, *[V] * len(images), word, 20 + i, *range(30, 30 + i), 2]
            labels = [X] * (len(images) + 2) + ids[len(images) + 2 :]
            samples.append((TokenisedSample(ids, labels), images))
        return samples

    return make


@pytest.fixture(params=IMPLEMENTATIONS)
def model(request, make_model):
    model = make_model(num_key_value_heads=2)
    model.language_model.set_attn_implementation(request.param)
    return model


def checkpointed(model):
    checkpoint_activations(model)
    return model


def spans_of(batch, row):
    """The slices of the samples of a row."""
    numbers = batch.attention_mask[row]
    return [(numbers == number).nonzero().squeeze(-1) for number in range(1, int(numbers.max()) + 1)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_changing_one_sample_changes_no_logit_of_another(model, make_samples, make_batch, checkpointing):
    if checkpointing:
        checkpointed(model)
    batch, changed = (make_batch(make_samples(one), rows=ROWS) for one in (None, 2))
    logits, others = (model(**{**one.as_inputs(), "labels": None}).logits for one in (batch, changed))
    for row, samples in enumerate(ROWS):
        for span, sample in zip(spans_of(batch, row), samples, strict=True):
            assert torch.equal(logits[row, span], others[row, span]) == (sample != 2)


def test_no_gradient_flows_from_one_sample_to_another(model, make_samples, make_batch):
    batch = make_batch(make_samples(), rows=ROWS)
    features = batch.features.clone().requires_grad_()
    inputs = {**batch.as_inputs(), "features": features}
    inputs["labels"] = torch.full_like(batch.labels, X)
    span = spans_of(batch, 0)[1]  # sample 2: the second to fourth sub-images
    inputs["labels"][0, span] = batch.labels[0, span]
    checkpointed(model)(**inputs).loss.backward()
    touched = features.grad.abs().sum((1, 2)) > 0
    assert touched.tolist() == [False, True, True, True, False, False]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_and_padded_rows_have_the_loss_and_the_gradients_of_each_sample_alone(
    model, make_model, make_samples, make_batch, checkpointing
):
    truth = make_model(num_key_value_heads=2)  # sdpa, one sample after the other
    samples = make_samples()
    num_items = sum(label != X for tokens, _ in samples for label in tokens.labels)
    expected = 0.0
    for sample in samples:
        loss = truth(**make_batch([sample]).as_inputs(), num_items_in_batch=num_items).loss
        loss.backward()
        expected += loss.item()
    if checkpointing:
        checkpointed(model)
    for rows in ([[0, 2, 1], [3, 4]], [[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]]):
        model.zero_grad()
        loss = model(**make_batch(samples, rows=rows).as_inputs(), num_items_in_batch=num_items).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        for (name, one), other in zip(truth.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_positions_and_labels_of_a_row_by_hand():
    # Two samples, the second with an unused slot at its end and one inside; then padding.
    sample_BL = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2, 0]])
    attended_BL = torch.tensor([[1, 1, 1, 1, 0, 1, 0, 1, 0]]).bool()
    layout = Layout.of(sample_BL, attended_BL)
    assert layout.position_BL.tolist() == [[0, 1, 2, 0, 1, 1, 2, 2, 0]]
    assert layout.sample_BL.tolist() == [[1, 1, 1, 2, 0, 2, 0, 2, 0]]
    flat = layout.unpadded()
    assert flat.kept_N.tolist() == [0, 1, 2, 3, 5, 7]
    assert (flat.bounds.tolist(), flat.longest) == ([0, 3, 6], 3)
    # What follows an unused slot is predicted by the token before it; the first sample's end predicts nothing.
    assert flat.next_labels(torch.tensor([[X, 5, 6, 7, X, 8, X, 9, X]])).tolist() == [5, 6, X, 8, 9, X]


def test_rows_on_the_left_start_at_position_zero_too():
    sample_BL = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert Layout.of(sample_BL, sample_BL > 0).position_BL[:, 2:].tolist() == [[0, 1], [2, 3]]
    assert Layout.of(sample_BL, sample_BL > 0).unpadded().bounds.tolist() == [0, 2, 6]


def test_answering_with_varlen_says_what_to_take(make_model, make_samples, make_batch):
    model = make_model()
    model.language_model.set_attn_implementation("varlen")
    with pytest.raises(SettingsError, match="take 'sdpa', which is also the attention to answer with"):
        model.generate(**make_batch(make_samples()[:1]).as_inputs(), max_new_tokens=2)


def test_a_language_model_that_scales_its_logits_keeps_its_own_loss(make_model, make_samples, make_batch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    granite = GraniteForCausalLM(GraniteConfig(**sizes, num_attention_heads=4, logits_scaling=8.0))
    model = MeteorForConditionalGeneration(make_model().config, vision_tower=False, language_model=granite)
    batch = make_batch(make_samples()[:2])
    logits = model(**{**batch.as_inputs(), "labels": None}).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    torch.testing.assert_close(model(**batch.as_inputs()).loss, expected, **TOLERANCE)
