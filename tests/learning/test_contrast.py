"""The contrast set cannot be learnt without the image."""

import json
from collections import Counter
from pathlib import Path

import pytest
from contrast import ContrastSet, make_contrast_set
from PIL import Image

from meteor.errors import SettingsError
from meteor.image.slicing import plan_slices


@pytest.fixture(scope="module")
def contrast(tmp_path_factory: pytest.TempPathFactory) -> ContrastSet:
    return make_contrast_set(tmp_path_factory.mktemp("contrast"), 32, num_answers=4)


def test_the_question_is_the_same_for_every_image(contrast: ContrastSet) -> None:
    samples = json.loads(contrast.samples.read_text())
    assert len(samples) == 32
    assert len({sample["image"] for sample in samples}) == 32
    assert len({sample["conversations"][0]["value"] for sample in samples}) == 1


@pytest.mark.parametrize("resolution", [112, 336])
def test_each_answer_comes_equally_often_with_sliced_and_whole_images(contrast: ContrastSet, resolution: int) -> None:
    counts = Counter()
    for sample in json.loads(contrast.samples.read_text()):
        with Image.open(contrast.images / sample["image"]) as image:
            plan = plan_slices(*image.size, resolution=resolution)
        counts[sample["conversations"][1]["value"], plan.num_sub_images > 1] += 1
    assert len(counts) == 8
    assert set(counts.values()) == {4}


def test_eight_answers_can_be_had(tmp_path: Path) -> None:
    samples = json.loads(make_contrast_set(tmp_path, 16, num_answers=8).samples.read_text())
    assert set(Counter(sample["conversations"][1]["value"] for sample in samples).values()) == {2}


@pytest.mark.parametrize(("num_samples", "num_answers"), [(12, 4), (0, 4), (4, 1), (36, 9)])
def test_a_number_that_cannot_be_divided_evenly_is_refused(tmp_path: Path, num_samples: int, num_answers: int) -> None:
    with pytest.raises(SettingsError, match=f"num_samples={num_samples} "):
        make_contrast_set(tmp_path, num_samples, num_answers=num_answers)
