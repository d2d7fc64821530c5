"""Contrast set for overfitting tests: a single question for all images, answered by the image alone; half are sliced."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meteor.errors import SettingsError
from meteor.synthetic.dataset import GENERATOR_VERSION, make_sample, write_images, write_scenes
from meteor.synthetic.layout import Wanted, place_all
from meteor.synthetic.publish import publish_folder
from meteor.synthetic.questions import Question
from meteor.synthetic.scenes import Scene, SceneObject
from meteor.synthetic.streams import random_stream
from meteor.synthetic.vocabulary import COLOURS, SHAPES

QUESTION = "What colour is the shape?"
_RECORD = "contrast_set.json"
# Sizes below 112 x 112 pixels are never sliced, sizes above 336 x 336 always, at both resolutions that the tests use.
_WHOLE_SIZES = ((96, 96), (112, 84), (80, 110))
_SLICED_SIZES = ((480, 360), (640, 400), (360, 480))
_SCALE = (0.5, 0.8)


@dataclass(frozen=True)
class ContrastSet:
    """Paths of a contrast set; its samples name images relative to ``images``."""

    folder: Path

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def samples(self) -> Path:
        """Samples in LLaVA's format, for training and evaluation."""
        return self.folder / "samples.json"

    @property
    def scenes(self) -> Path:
        """Description of every image, a JSON object per line."""
        return self.folder / "scenes.jsonl"


def make_contrast_set(folder: str | Path, num_samples: int = 64, seed: int = 0, *, num_answers: int = 4) -> ContrastSet:
    """Write a contrast set, unless the folder holds the set with equal arguments already.

    A model that ignores the image answers at most ``1 / num_answers`` of the questions correctly: all samples have one
    question, one image and one turn, and each answer occurs equally often with whole and with sliced images.

    Args:
        folder: written folder, which appears complete or not at all.
        num_samples: number of samples, a multiple of twice ``num_answers``.
        seed: seed of the images.
        num_answers: number of different answers, from 2.

    Raises:
        SettingsError: the samples cannot be divided evenly among the answers.
        AlreadyExistsError: the folder holds something else.
    """
    if not 2 <= num_answers <= len(COLOURS) or num_samples < 1 or num_samples % (2 * num_answers):
        raise SettingsError(
            f"num_samples={num_samples} must be a multiple of twice num_answers={num_answers} (2 to {len(COLOURS)})."
        )
    contrast = ContrastSet(Path(folder))
    arguments = {
        "num_samples": num_samples,
        "num_answers": num_answers,
        "seed": seed,
        "generator_version": GENERATOR_VERSION,
    }

    def fill(temporary: Path) -> dict[str, Any]:
        return _fill(ContrastSet(temporary), num_samples, seed, num_answers)

    publish_folder(contrast.folder, _RECORD, arguments, fill)
    return contrast


def _fill(contrast: ContrastSet, num_samples: int, seed: int, num_answers: int) -> dict[str, Any]:
    rng = random_stream(seed, "contrast set")
    colours = list(COLOURS)[:num_answers]
    scenes = {}
    for index in range(num_samples):
        sizes = _SLICED_SIZES if (index // num_answers) % 2 else _WHOLE_SIZES
        scenes[f"{index:06d}.png"] = _lone_shape(rng, colours[index % num_answers], sizes)
    write_images(contrast.images, scenes)
    write_scenes(contrast.scenes, {"train": scenes})
    samples = [
        make_sample(f"contrast-{index}", [name], [Question("colour", QUESTION, scene.objects[0].colour)], "colour")
        for index, (name, scene) in enumerate(scenes.items())
    ]
    contrast.samples.write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    return {"answers": colours}


def _lone_shape(rng: np.random.Generator, colour: str, sizes: tuple[tuple[int, int], ...]) -> Scene:
    width, height = sizes[rng.integers(len(sizes))]
    want = Wanted(SHAPES[rng.integers(len(SHAPES))], colour)
    (at,) = place_all(rng, width, height, [want], _SCALE)
    thing = SceneObject(want.shape, colour, at.box, at.place)
    return Scene(width, height, (thing,), texture_seed=int(rng.integers(2**31)))
