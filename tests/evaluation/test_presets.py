"""Presets of published evaluations: OCR tokens, image size and prompts by benchmark, and what comes before them."""

import typing

import pytest

from meteor.config import RunSettings
from meteor.config.settings import EvaluateSettings
from meteor.errors import SettingsError
from meteor.evaluation.benchmarks.presets import PRESETS, choose_protocol
from meteor.evaluation.benchmarks.prompts import Protocol
from meteor.evaluation.question_set import load_question_set
from meteor.runs.identity import NamesAlone, identify_all
from meteor.synthetic.benchmarks import write_benchmarks
from pipelines.ray_parts.answers import prompt_digest


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks") / "all", num_scenes=2)


@pytest.fixture
def load(folders, tmp_path):
    def load(format, preset=None, **options):
        uri, root = str(folders / format), str(tmp_path / "images")
        return load_question_set("set", format=format, uri=uri, embedded_root=root, preset=preset, **options)

    return load


def test_settings_know_every_preset():
    [names, _] = typing.get_args(EvaluateSettings.model_fields["preset"].annotation)
    assert set(typing.get_args(names)) == set(PRESETS)


@pytest.mark.parametrize(
    ("preset", "format", "expected"),
    [
        (None, "textvqa", Protocol()),
        ("llava_1_5", "textvqa", Protocol(ocr=True)),
        ("llava_1_5", "gqa", Protocol()),
        ("llava_1_5", "mmmu", Protocol(blank_line=True)),
        ("llava_uhd", "textvqa", Protocol(ocr=True, long_side=1024)),
        ("llava_uhd", "vizwiz", Protocol(long_side=1024)),
        ("llava_uhd", "mmbench", Protocol()),
        ("llava_uhd", "llava", Protocol()),
    ],
)
def test_a_preset_decides_by_benchmark(preset, format, expected):
    assert choose_protocol(format, preset) == (expected, {})


def test_settings_of_the_run_come_before_the_preset_and_are_named():
    assert choose_protocol("textvqa", "llava_uhd", ocr=False, long_side=672) == (
        Protocol(long_side=672),
        {"ocr": False, "long_side": 672},
    )
    assert choose_protocol("gqa", "llava_uhd", long_side="original") == (Protocol(), {"long_side": None})
    # Nothing is changed where both say the same.
    assert choose_protocol("textvqa", "llava_uhd", ocr=True, long_side=1024)[1] == {}
    assert choose_protocol("textvqa", None, ocr=True) == (Protocol(ocr=True), {})


def test_a_preset_stands_in_the_key_of_the_scores(load):
    plain, preset = load("gqa"), load("gqa", "llava_1_5")
    assert plain.digest == preset.digest
    assert plain.scoring_digest != preset.scoring_digest
    assert "preset" not in plain.facts
    assert (preset.facts["preset"], preset.facts["changes"]) == ("llava_1_5", {})
    assert load("gqa", "llava_uhd", long_side=672).facts["changes"] == {"long_side": 672}


def test_answers_are_shared_where_prompts_and_images_are_equal_and_only_there(load):
    def prompts(*arguments):
        return [prompt_digest(question, 16) for question in load(*arguments).questions]

    assert prompts("gqa") == prompts("gqa", "llava_1_5")
    assert not set(prompts("textvqa")) & set(prompts("textvqa", "llava_1_5"))
    assert not set(prompts("mmmu")) & set(prompts("mmmu", "llava_1_5"))


def test_mmmu_has_lmms_evals_blank_line_before_the_request(load):
    [plain, preset] = [load("mmmu", name).questions[0].text for name in (None, "llava_1_5")]
    assert preset.replace("\n\nAnswer", "\nAnswer") == plain != preset


def test_llava_uhds_preset_resizes_all_but_mmbench(load):
    resized = {format: bool(load(format, "llava_uhd").resized) for format in ("gqa", "pope", "mmmu", "mmbench", "nlvr")}
    assert resized == {"gqa": True, "pope": True, "mmmu": True, "mmbench": False, "nlvr": False}


def test_ocr_tokens_are_refused_where_a_benchmark_has_none_with_a_preset_too(load):
    with pytest.raises(SettingsError, match=r"remove data\.evaluate\.set\.ocr"):
        load("gqa", "llava_1_5", ocr=True)


@pytest.mark.parametrize(
    ("format", "options", "scorer"),
    [
        ("gqa", {}, ""),
        ("vqav2", {}, ""),
        ("vqav2", {"split": "test-dev"}, "server"),
        ("vizwiz", {"split": "test"}, "server"),
        ("mmvet", {}, "judge"),
    ],
)
def test_a_set_says_who_scores_it(load, format, options, scorer):
    assert load(format, **options).scored_by == scorer


def test_a_preset_makes_another_evaluation_of_the_same_training():
    def digests(**evaluate):
        data = {"finetune": "samples.json", "evaluate": {"a": {"format": "gqa", "path": "gqa"}}}
        run = RunSettings.model_validate({"name": "r", "output": "out", "data": data, "evaluate": evaluate})
        return {stage: identity.digest for stage, identity in identify_all(NamesAlone(run)).items()}

    plain, preset, resized = digests(), digests(preset="llava_uhd"), digests(long_side=672)
    assert plain["finetune"] == preset["finetune"] == resized["finetune"]
    # Resized images are other images to encode.
    for stage in ("cache_features", "evaluate"):
        assert len({plain[stage], preset[stage], resized[stage]}) == 3
