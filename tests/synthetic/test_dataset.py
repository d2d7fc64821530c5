"""The written data set is LLaVA's format, complete, and separates training from held-out scenes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from meteor.constants import IMAGE_PLACEHOLDER
from meteor.errors import AlreadyExistsError, SettingsError
from meteor.synthetic.dataset import SyntheticDataset, write_dataset
from meteor.synthetic.questions import TEXT_ONLY, TWO_IMAGES

OF_ONE_IMAGE = ("count", "colour", "shape", "text", "position")


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def images_of(sample: dict[str, Any]) -> list[str]:
    image = sample.get("image", [])
    return [image] if isinstance(image, str) else image


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_sample_is_in_llavas_format(dataset: SyntheticDataset) -> None:
    for path in (dataset.pretrain, dataset.finetune, dataset.evaluate):
        samples = read(path)
        assert len({sample["id"] for sample in samples}) == len(samples)
        for sample in samples:
            turns = sample["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert all(turn["value"].strip() for turn in turns)
            placeholders = [turn["value"].count(IMAGE_PLACEHOLDER) for turn in turns]
            assert placeholders == [len(images_of(sample))] + [0] * (len(turns) - 1)
            assert all((dataset.images / name).is_file() for name in images_of(sample))


def test_each_training_scene_has_one_caption(dataset: SyntheticDataset) -> None:
    captions = {sample["image"]: sample["conversations"][1]["value"] for sample in read(dataset.pretrain)}
    scenes = [json.loads(line) for line in dataset.scenes.read_text().splitlines()]
    assert captions == {scene["name"]: scene["caption"] for scene in scenes if scene["split"] == "train"}


def test_no_held_out_image_is_trained_on(dataset: SyntheticDataset) -> None:
    trained = {name for path in (dataset.pretrain, dataset.finetune) for s in read(path) for name in images_of(s)}
    held_out = {name for sample in read(dataset.evaluate) for name in images_of(sample)}
    assert len(trained) == 24
    assert len(held_out) == 16
    pixels = [digests(dataset.images)[name] for name in (*trained, *held_out)]
    assert len(set(pixels)) == 40


def test_instruction_samples_have_several_turns_one_turn_two_images_and_none(dataset: SyntheticDataset) -> None:
    samples = read(dataset.finetune)
    assert {len(images_of(sample)) for sample in samples} == {0, 1, 2}
    assert max(len(sample["conversations"]) for sample in samples) >= 8
    assert {sample.get("type") for sample in samples} == {*OF_ONE_IMAGE, TWO_IMAGES, TEXT_ONLY, None}


def test_held_out_samples_have_one_question_and_a_type(dataset: SyntheticDataset) -> None:
    samples = read(dataset.evaluate)
    assert {len(sample["conversations"]) for sample in samples} == {2}
    assert {sample["type"] for sample in samples} == {*OF_ONE_IMAGE, TWO_IMAGES, TEXT_ONLY}


def test_scene_lines_have_the_size_of_their_images_in_both_formats(dataset: SyntheticDataset) -> None:
    formats = set()
    for line in dataset.scenes.read_text().splitlines():
        scene = json.loads(line)
        with Image.open(dataset.images / scene["name"]) as image:
            assert image.size == (scene["width"], scene["height"])
            assert image.mode == "RGB"
            formats.add(image.format)
        assert all(len(thing["box"]) == 4 for thing in scene["objects"])
    assert formats == {"PNG", "JPEG"}


def test_the_same_arguments_give_the_same_bytes(dataset: SyntheticDataset, tmp_path: Path) -> None:
    again = write_dataset(tmp_path / "again", num_scenes=24, num_held_out=16, seed=3)
    assert digests(again.folder) == digests(dataset.folder)


def test_more_training_scenes_leave_the_held_out_ones_as_they_are(dataset: SyntheticDataset, tmp_path: Path) -> None:
    larger = write_dataset(tmp_path / "larger", num_scenes=25, num_held_out=16, seed=3)
    assert larger.evaluate.read_bytes() == dataset.evaluate.read_bytes()
    assert digests(larger.images / "held_out") == digests(dataset.images / "held_out")


def test_a_second_call_finds_the_work_done_and_other_arguments_are_refused(dataset: SyntheticDataset) -> None:
    before = dataset.pretrain.stat().st_mtime_ns
    assert write_dataset(dataset.folder, num_scenes=24, num_held_out=16, seed=3) == dataset
    assert dataset.pretrain.stat().st_mtime_ns == before
    with pytest.raises(AlreadyExistsError, match="choose another folder"):
        write_dataset(dataset.folder, num_scenes=24, num_held_out=16, seed=4)


def test_too_few_scenes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="num_held_out=7"):
        write_dataset(tmp_path, num_scenes=8, num_held_out=7)
