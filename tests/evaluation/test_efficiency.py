"""Efficiency, as far as counts go."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from meteor.data.samples import Sample
from meteor.evaluation.answer import Answerer
from meteor.evaluation.efficiency import measure_answers
from meteor.evaluation.questions import Question
from meteor.image.pixels import SlicedImage
from meteor.model import MeteorImageProcessor, MeteorProcessor
from meteor.model.flops import AnswerFlops
from meteor.text.conversation import Turn
from meteor.text.tokenizer import load_tokenizer


@pytest.fixture
def make_answerer(make_model, tokenizer_folder, tmp_path):
    def make(projector=None):
        model = make_model(projector or {"name": "meteor", "k": 4}, vision_tower=True, image_token_id=57)
        folder = str(tmp_path / "model")
        model.save_pretrained(folder)
        images = MeteorImageProcessor(resolution=56, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        processor = MeteorProcessor(images, load_tokenizer(tokenizer_folder), model.config.projector)
        processor.save_pretrained(folder)
        return Answerer(folder, device="cpu", dtype=torch.float32)

    return make


def make_question(key, text="what is it?"):
    return Question("q", Sample("q", ("a.png",), (Turn("human", text, 1),)), image_keys=(key,))


def make_images(cache, keys):
    """Black images with the patch grids of the cached ones."""
    return {
        key: SlicedImage(
            key,
            image.width,
            image.height,
            SimpleNamespace(grid=image.grid, patch_grids=image.patch_grids),
            [np.zeros((14 * rows, 14 * columns, 3), np.uint8) for rows, columns in image.patch_grids],
        )
        for key in keys
        for image in [cache.get(key)]
    }


def test_slots_that_an_adaptive_projector_leaves_unused_are_not_counted(make_answerer, make_cache):
    answerer, cache = make_answerer({"name": "prumerge_plus", "max_tokens": 8, "spaced": 2}), make_cache()
    measured = measure_answers(
        answerer,
        [make_question(key) for key in cache.keys()[:2]],
        cache,
        make_images(cache, cache.keys()[:2]),
        new_tokens=2,
        rounds=1,
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
    images = make_images(cache, cache.keys()[:2])
    measured = measure_answers(answerer, questions, cache, images, new_tokens=5, rounds=2)
    # Two questions, in a round that is not timed and two that are; each answer once, its tokens timed one by one.
    assert asked == [5, 5] * 3
    assert measured.tokens_per_s > 0
    assert (measured.num_questions, measured.num_visual_tokens) == (2, (4 + 12) / 2)
    lengths = [answerer.batch([question], cache).input_ids.shape[1] for question in questions]
    assert measured.num_prompt_tokens == sum(lengths) / 2
    assert 0 < measured.projector_s < measured.prefill_s
    assert measured.encoder_s > 0
    flops = AnswerFlops.of(answerer.model.language_model)
    assert measured.prefill_flops == sum(map(flops.prompt, lengths)) / 2
    assert measured.token_flops == sum(flops.later_tokens(length, 5) for length in lengths) / 8
    assert measured.used_share == 1
    assert measured.memory_bytes > 1e6
    assert measured.hardware.startswith("CPU, 1 thread, torch")
