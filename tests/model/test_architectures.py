"""Every architecture: the table of the documentation, and loss and gradients of packed and grouped rows against itself."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.model import MeteorConfig, MeteorForConditionalGeneration
from meteor.model.language_model import set_attention
from meteor.model.tiny import tiny_model
from meteor.model.trial import find_ways
from meteor.text.tokens import TokenisedSample

sys.path.insert(0, str(Path(__file__).parent))
from architectures import ARCHITECTURES, QUICK

PAGE = Path(__file__).parents[2] / "docs/language-models.md"
V, X = IMAGE_PLACE, IGNORE_INDEX
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about absent kernels


def make_config(name):
    return AutoConfig.for_model(name, **ARCHITECTURES[name][1])


def table_row(name, ways):
    """The row of the documentation's table."""
    packed, single = (
        ", ".join(attention for attention in ("varlen", "sdpa", "eager") if reasons.get(attention, "") is None)
        for reasons in (ways.packed, ways.single)
    )
    assert ways.problem is None
    together = "yes" if ways.answering is None else "no"
    return f"| {ARCHITECTURES[name][0]} | `{name}` | {packed or 'no'} | {single or 'no'} | {together} |"


@pytest.mark.parametrize("name", EVERY)
def test_the_table_says_how_an_architecture_can_be_computed(name):
    row = table_row(name, find_ways(make_config(name)))
    assert row in PAGE.read_text().splitlines()


@pytest.fixture
def make_samples(make_features):
    def make():
        """Five samples, the first and the last with two images."""
        samples = []
        for i in range(5):
            num_images = (2, 0, 1, 1, 2)[i]
            images = [make_features(f"k{i}{n}", sliced=i == 2, seed=10 * i + n) for n in range(num_images)]
            ids = [1, *[V] * num_images, 10 + i, 20 + i, *range(30, 36 + i), 2]
            labels = [X] * (num_images + 2) + ids[num_images + 2 :]
            samples.append((TokenisedSample(ids, labels), images))
        return samples

    return make


def own_loss(model, batch):
    """Loss of a single sample by the language model alone, with its eager attention: no mask, no rows, no answer head."""
    language_model = model.language_model
    embeds, attended, _ = model.embed(batch.input_ids, batch.attention_mask, batch.num_slots, *features_of(batch))
    seen = attended[0]
    logits = language_model(inputs_embeds=embeds[:, seen], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], batch.labels[0, seen][1:], ignore_index=X, reduction="sum")


def features_of(batch):
    return batch.features, batch.cls_attention, batch.grids


def wrapped(name, make_model):
    """The architecture's tiny model behind a projector that leaves slots unused."""
    language_model = tiny_model(make_config(name))
    config = MeteorConfig(
        text_config=language_model.config,
        vision_config=make_model().config.vision_config,
        projector={"name": "meteor", "k": 7},
    )
    return MeteorForConditionalGeneration(config, vision_tower=False, language_model=language_model)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "bert"])
def test_rows_have_the_loss_and_the_gradients_of_each_sample_alone(name, make_model, make_samples, make_batch):
    ways, projector = find_ways(make_config(name)), {"name": "meteor", "k": 7}
    if not ways.trains:
        pytest.skip("the table says that it cannot be trained")
    model, samples = wrapped(name, make_model), make_samples()
    set_attention(model.language_model, "eager")
    expected = sum(own_loss(model, make_batch([sample], projector)) for sample in samples) / 40
    expected.backward()
    truth = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    layouts = [(attention, [[0, 2, 1], [3, 4]]) for attention, reason in ways.packed.items() if reason is None]
    layouts += [(attention, [[i] for i in range(5)]) for attention, reason in ways.single.items() if reason is None]
    for attention, rows in layouts:
        set_attention(model.language_model, attention)
        model.zero_grad()
        loss = model(**make_batch(samples, projector, rows=rows).as_inputs(), num_items_in_batch=40).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4), (attention, rows)
        for weight_name, weight in model.named_parameters():
            if weight_name in truth:
                torch.testing.assert_close(
                    weight.grad,
                    truth[weight_name],
                    rtol=1e-3,
                    atol=1e-4,
                    msg=lambda text, n=weight_name: f"{n}: {text}",
                )
