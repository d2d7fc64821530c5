"""Importance maps against the attention weights of transformers' own layers; and efficiency, as far as counts go."""

import numpy as np
import pytest
import torch

from meteor.data.samples import Sample
from meteor.evaluation.answer import Answerer
from meteor.evaluation.efficiency import measure_answers
from meteor.evaluation.importance import importance_maps
from meteor.evaluation.questions import Question
from meteor.image.pixels import PixelSettings
from meteor.model import MeteorProcessor
from meteor.text.conversation import Turn
from meteor.text.tokens import load_tokenizer


@pytest.fixture
def make_answerer(make_model, tokenizer_folder, tmp_path):
    def make(projector=None, text_sampler=None):
        model = make_model(
            projector or {"name": "meteor", "k": 4}, vision_tower=True, text_sampler=text_sampler, num_hidden_layers=3
        )
        folder = str(tmp_path / "model")
        model.save_pretrained(folder)
        settings = {"pixels": PixelSettings(resolution=56), "mean": [0.5] * 3, "std": [0.5] * 3}
        processor = MeteorProcessor(load_tokenizer(tokenizer_folder), projector=model.config.projector, **settings)
        processor.save_pretrained(folder)
        return Answerer(folder, device="cpu", dtype=torch.float32)

    return make


def make_question(key, text="what is it?"):
    return Question("q", Sample("q", ("a.png",), (Turn("human", text, 1),)), image_keys=(key,))


@pytest.mark.parametrize("text_sampler", [None, {"layer": 1, "keep": 0.5}])
def test_maps_are_the_mean_attention_of_the_questions_words(make_answerer, make_cache, text_sampler):
    answerer, cache = make_answerer(text_sampler=text_sampler), make_cache()
    question = make_question(cache.keys()[1])
    found = importance_maps(answerer, question, cache)

    model, batch = answerer.model, answerer.batch([question], cache)
    inputs = {
        name: value for name, value in batch.as_inputs().items() if name not in ("labels", "turns", "image_numbers")
    }
    with torch.no_grad():
        embeds, _, output = model.embed(**inputs)
        if model.text_sampler is not None:
            model.text_sampler.begin(None)
        model.language_model.set_attn_implementation("eager")
        weights = model.language_model(inputs_embeds=embeds, output_attentions=True).attentions
    words = ((batch.turns[0] == 1) & (batch.image_numbers[0] == 0)).nonzero().squeeze(-1)
    slots = (batch.image_numbers[0] == 1).nonzero().squeeze(-1)[: int(batch.num_slots[0])]
    assert len(words) >= len("what is it?") - 2
    expected = torch.stack([one[0].mean(dim=0)[words][:, slots].mean(dim=0) for one in weights])
    np.testing.assert_allclose(found.scores, expected.numpy(), rtol=1e-4, atol=1e-6)
    assert found.patches.tolist() == output.indices[0].tolist()
    assert found.grid == tuple(batch.grids[0].tolist())
    assert model.text_sampler is None or model.text_sampler.keep == 0.5


def test_there_are_no_maps_without_words_or_without_patches(make_answerer, make_cache):
    cache = make_cache()
    assert importance_maps(make_answerer(), make_question(cache.keys()[0], ""), cache) is None
    pooled = make_answerer({"name": "avg_pool", "grid": 2})
    assert importance_maps(pooled, make_question(cache.keys()[0]), cache) is None


def test_slots_that_an_adaptive_projector_leaves_unused_are_not_counted(make_answerer, make_cache):
    answerer, cache = make_answerer({"name": "prumerge_plus", "max_tokens": 8, "spaced": 2}), make_cache()
    measured = measure_answers(
        answerer, [make_question(key) for key in cache.keys()[:2]], cache, new_tokens=2, rounds=1
    )
    # 8 slots of an unsliced image, 6 of each of the other's three sub-images; of each at least the two even ones.
    assert 2 * 4 / 2 <= measured.num_visual_tokens < (8 + 18) / 2
    assert measured.used_share == measured.num_visual_tokens * 2 / (8 + 18)


def test_answers_are_measured_apart_from_the_prompt_and_counted(make_answerer, make_cache, monkeypatch):
    answerer, cache = make_answerer(), make_cache()
    asked = []
    generate = type(answerer).generate

    def count(self, batch, **options):
        asked.append(options["max_new_tokens"])
        return generate(self, batch, **options)

    monkeypatch.setattr(type(answerer), "generate", count)
    questions = [make_question(key) for key in cache.keys()[:2]]
    measured = measure_answers(answerer, questions, cache, new_tokens=5, rounds=2)
    # Two questions, in a round that is not timed and two that are; each answer once, its tokens timed one by one.
    assert asked == [5, 5] * 3
    assert measured.tokens_per_s > 0
    assert (measured.num_questions, measured.num_visual_tokens) == (2, (4 + 12) / 2)
    lengths = [answerer.batch([question], cache).input_ids.shape[1] for question in questions]
    assert measured.num_prompt_tokens == sum(lengths) / 2
    assert measured.prefill_s > 0
    assert measured.used_share == 1
    assert measured.memory_bytes > 1e6
    assert measured.hardware.startswith("CPU, 1 thread, torch")
