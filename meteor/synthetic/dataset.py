"""Generated scenes as a data set in LLaVA's format: images, captions, instruction samples, held-out questions."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from meteor.constants import IMAGE_PLACEHOLDER
from meteor.errors import SettingsError
from meteor.synthetic.drawing import draw
from meteor.synthetic.publish import publish_folder
from meteor.synthetic.questions import PairDealer, Question, ask, ask_in_turns, ask_without_image
from meteor.synthetic.scenes import Scene, SceneDealer
from meteor.synthetic.streams import random_stream

# The version of the generator's output is part of a data set's record: older folders are refused instead of mixed in.
GENERATOR_VERSION = 1
MIN_SCENES = 8
_RECORD = "dataset.json"
_CAPTION_REQUESTS = ("Describe the picture.", "What is in the picture?", "Give a short description of the picture.")
_SCENES_PER_PAIR = 6
_SCENES_PER_TEXT_ONLY = 10
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class SyntheticDataset:
    """Paths of a generated data set; its samples name images relative to ``images``."""

    folder: Path

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def pretrain(self) -> Path:
        """Samples of stage 1: a caption for every training scene."""
        return self.folder / "pretrain.json"

    @property
    def finetune(self) -> Path:
        """Samples of stage 2: questions about one image (in one or several turns), two images, or no image."""
        return self.folder / "finetune.json"

    @property
    def evaluate(self) -> Path:
        """Questions about held-out scenes, one per sample, with the question's type under the key ``type``."""
        return self.folder / "evaluate.json"

    @property
    def scenes(self) -> Path:
        """Description of every image, a JSON object per line: name, split, size, caption, objects with boxes."""
        return self.folder / "scenes.jsonl"


def write_dataset(
    folder: str | Path, *, num_scenes: int = 240, num_held_out: int = 60, seed: int = 0
) -> SyntheticDataset:
    """Write a data set, unless the folder holds the data set with equal arguments already.

    Args:
        folder: written folder, which appears complete or not at all.
        num_scenes: number of training scenes.
        num_held_out: number of scenes of ``evaluate.json``, which are not trained on.
        seed: seed of images and questions.

    Raises:
        SettingsError: a split has fewer than eight scenes, too few for questions about two images.
        AlreadyExistsError: the folder holds something else.
    """
    if min(num_scenes, num_held_out) < MIN_SCENES:
        raise SettingsError(
            f"num_scenes={num_scenes} and num_held_out={num_held_out} must both be {MIN_SCENES} or more."
        )
    dataset = SyntheticDataset(Path(folder))
    arguments = {
        "num_scenes": num_scenes,
        "num_held_out": num_held_out,
        "seed": seed,
        "generator_version": GENERATOR_VERSION,
    }

    def fill(temporary: Path) -> dict[str, Any]:
        return _fill(SyntheticDataset(temporary), num_scenes, num_held_out, seed)

    publish_folder(dataset.folder, _RECORD, arguments, fill)
    return dataset


def _fill(dataset: SyntheticDataset, num_scenes: int, num_held_out: int, seed: int) -> dict[str, Any]:
    # Each split has its own random stream, so that held-out scenes do not change with the number of training scenes.
    train, held_out = (
        dict(zip(_names(split, count), islice(SceneDealer(random_stream(seed, f"{split} scenes")), count), strict=True))
        for split, count in (("train", num_scenes), ("held_out", num_held_out))
    )
    write_images(dataset.images, {**train, **held_out})
    samples = {
        dataset.pretrain: _caption_samples(train, random_stream(seed, "captions")),
        dataset.finetune: _finetune_samples(train, random_stream(seed, "questions")),
        dataset.evaluate: _evaluate_samples(held_out, random_stream(seed, "held-out questions")),
    }
    for path, listed in samples.items():
        path.write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    write_scenes(dataset.scenes, {"train": train, "held_out": held_out})
    return {"num_samples": {path.name: len(listed) for path, listed in samples.items()}}


def _names(split: str, count: int) -> list[str]:
    # Every second image is a JPEG, so that both formats are used; scenes do not differ otherwise.
    return [f"{split}/{index:06d}.{'jpg' if index % 2 else 'png'}" for index in range(count)]


def write_images(folder: Path, scenes: dict[str, Scene]) -> None:
    """Draw each scene into ``folder / name``, in the format of the name's suffix."""
    for name, scene in scenes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"quality": _JPEG_QUALITY} if path.suffix == ".jpg" else {"compress_level": 1}
        draw(scene).save(path, **options)


def write_scenes(path: Path, splits: dict[str, dict[str, Scene]]) -> None:
    """Write a line of JSON per scene, with its image's name and split."""
    lines = [
        json.dumps({"name": name, "split": split, **scene.to_dict()})
        for split, scenes in splits.items()
        for name, scene in scenes.items()
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_sample(sample_id: str, images: list[str], questions: list[Question], type_: str = "") -> dict[str, Any]:
    """Make a sample in LLaVA's format, with a placeholder for each image before the first question."""
    placeholders = f"{IMAGE_PLACEHOLDER}\n" * len(images)
    turns = [
        turn
        for index, question in enumerate(questions)
        for turn in (
            {"from": "human", "value": placeholders * (index == 0) + question.text},
            {"from": "gpt", "value": question.answer},
        )
    ]
    image = {"image": images[0] if len(images) == 1 else images} if images else {}
    return {"id": sample_id, **image, "conversations": turns, **({"type": type_} if type_ else {})}


def _caption_samples(scenes: dict[str, Scene], rng: np.random.Generator) -> list[dict[str, Any]]:
    requests = [_CAPTION_REQUESTS[rng.integers(len(_CAPTION_REQUESTS))] for _ in scenes]
    return [
        make_sample(f"caption-{index}", [name], [Question("caption", request, scene.caption)])
        for index, ((name, scene), request) in enumerate(zip(scenes.items(), requests, strict=True))
    ]


def _finetune_samples(scenes: dict[str, Scene], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Make one conversation for each scene of one half, and a sample per question for the other scenes."""
    samples = []
    for index, (name, scene) in enumerate(scenes.items()):
        if index % 4 < 2:
            samples.append(make_sample(f"turns-{index}", [name], ask_in_turns(scene, rng)))
        else:
            samples += _single_question_samples(f"scene-{index}", name, scene, rng)
    return samples + _other_samples(scenes, rng)


def _evaluate_samples(scenes: dict[str, Scene], rng: np.random.Generator) -> list[dict[str, Any]]:
    samples = []
    for index, (name, scene) in enumerate(scenes.items()):
        samples += _single_question_samples(f"held-out-{index}", name, scene, rng)
    return samples + _other_samples(scenes, rng)


def _single_question_samples(prefix: str, name: str, scene: Scene, rng: np.random.Generator) -> list[dict[str, Any]]:
    return [make_sample(f"{prefix}-{question.type}", [name], [question], question.type) for question in ask(scene, rng)]


def _other_samples(scenes: dict[str, Scene], rng: np.random.Generator) -> list[dict[str, Any]]:
    names = list(scenes)
    num_pairs = max(1, len(names) // _SCENES_PER_PAIR)
    num_text_only = max(1, len(names) // _SCENES_PER_TEXT_ONLY)
    pairs = islice(PairDealer(list(scenes.values()), rng), num_pairs)
    samples = [
        make_sample(f"two-images-{index}", [names[first], names[second]], [question], question.type)
        for index, (first, second, question) in enumerate(pairs)
    ]
    for index in range(num_text_only):
        question = ask_without_image(rng)
        samples.append(make_sample(f"text-only-{index}", [], [question], question.type))
    return samples
