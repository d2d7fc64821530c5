"""The `meteor` command as its users meet it: exit codes, what goes to stdout, what to stderr."""

import json
from pathlib import Path

import pytest

import meteor
from meteor.cli.config import explain
from meteor.cli.main import main
from meteor.config import RunSettings, StudySettings, load_run
from meteor.config.settings import QuestionSetSettings, StudyTableSettings
from meteor.formatting import flatten

RUN_FILES = sorted((Path(__file__).parents[2] / "jobs/runs").glob("*.yaml"))


def test_every_part_has_help_and_the_version_is_told(capsys):
    for argv, words in [
        (["--version"], [meteor.__version__]),
        (["--help"], ["config", "data", "cache", "synthetic"]),
        (["synthetic", "--help"], ["data", "models"]),
        (["synthetic", "data", "--help"], ["--scenes", "--held-out", "--seed", "folder"]),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert [word for word in words if word not in shown] == []


def test_what_config_show_prints_is_a_run_file_of_the_same_settings(call, write_run, tmp_path):
    run = write_run({"name": "mine", "output": str(tmp_path), "pretrain": {"lr": "2e-3"}, "projector": {"name": "mlp"}})
    code, shown, _ = call("config", "show", "--run", run, "pretrain.seed=7")
    assert code == 0
    settings = load_run(write_run(shown, "shown.yaml"))
    assert (settings.name, settings.pretrain.lr, settings.pretrain.seed) == ("mine", 2e-3, 7)
    assert call("config", "show", "--run", tmp_path / "shown.yaml")[1] == shown


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda file: file.stem)
def test_the_run_files_of_the_project_are_valid(call, file, monkeypatch):
    monkeypatch.chdir(file.parents[2])
    code, shown, errors = call("config", "validate", "--run", file)
    assert (code, errors) == (0, "")
    assert f"run {load_run(str(file)).name!r}" in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("pretrain: {learning_rate: 1}", "unknown setting pretrain.learning_rate = 1 (known here: "),
        ("projector: {settings: {kk: 3}}", "Projector 'meteor' does not know 'kk'"),
        ("projector: {settings: {k: 0}}", "k is 0"),
        ("projector: {name: none}", "no projector 'none'"),
    ],
)
def test_a_run_file_that_is_wrong_gives_code_2_and_the_reason(call, write_run, content, message):
    code, shown, errors = call("config", "validate", "--run", write_run(content))
    assert (code, shown) == (2, "")
    assert errors.startswith("SettingsError: ")
    assert message in errors


def test_two_run_files_are_compared_setting_by_setting(call, write_run):
    first = write_run("pretrain: {lr: 1e-3, seed: 3}\nprojector: {settings: {k: 64}}", "first.yaml")
    second = write_run("pretrain: {lr: 2e-3, seed: 3}\nprojector: {settings: {k: 32, window: 5}}", "second.yaml")
    code, shown, _ = call("config", "diff", first, second)
    assert code == 0
    assert shown.splitlines() == [
        "pretrain.lr: 0.001 -> 0.002",
        "projector.settings.k: 64 -> 32",
        "projector.settings.window: None -> 5",
    ]
    assert call("config", "diff", first, first) == (0, "", "")


def test_explain_names_every_setting_with_default_and_meaning(call):
    code, shown, _ = call("config", "explain")
    assert code == 0
    lines = explain(RunSettings)
    assert shown == "\n".join(lines) + "\n"
    names = {line.partition(" = ")[0] for line in lines}
    # A section that may be left out, and one of which there are several by name, with their own settings.
    more = {f"finetune.lora.{name}" for name in ("rank", "alpha", "dropout")}
    more |= {f"finetune.text_sampler.{name}" for name in ("layer", "keep")}
    more |= {f"study.{name}" for name in StudySettings.model_fields}
    more |= {f"study.tables.<name>.{name}" for name in StudyTableSettings.model_fields}
    more |= {f"data.evaluate.<name>.{name}" for name in QuestionSetSettings.model_fields}
    more |= {f"evaluate.sets.<name>.{name}" for name in ("k", "visual_weight", "sub_images")}
    assert "data.evaluate.<name>.path = (required)" in shown
    assert names == {name.rstrip(".") for name in flatten(RunSettings().model_dump())} | more
    assert "finetune.lr = 2e-05\n    peak learning rate" in lines
    (output,) = [line for line in lines if line.startswith("output = ")]
    assert output.endswith("[changes no result]")
    assert not [line for line in lines if line.endswith("\n    None")]


@pytest.fixture
def make_data(write_run, make_image, png, tokenizer_folder, tmp_path):
    """A run over three images, its captions of different lengths."""

    def make(*, captions=("a cat", "a dog is it", "none"), drop=(), **settings):
        (tmp_path / "images").mkdir()
        for i, size in enumerate([(56, 56), (112, 56), (56, 56)]):
            if i not in drop:
                # The third is the first again.
                (tmp_path / f"images/{i}.png").write_bytes(png(make_image(*size, seed=i % 2)))
        records = [
            {
                "id": f"s{i}",
                "image": f"{i}.png",
                "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": caption}],
            }
            for i, caption in enumerate(captions)
        ]
        (tmp_path / "samples.json").write_text(json.dumps(records))
        content = {
            "data": {"roots": {"": str(tmp_path / "images")}, "pretrain": str(tmp_path / "samples.json")},
            "llm": {"path": tokenizer_folder},
            "slicing": {"resolution": 56},
            "projector": {"settings": {"k": 4}},
        }
        return write_run({**content, **settings})

    return make


def test_good_data_give_code_0(call, make_data):
    code, shown, errors = call("data", "check", "--run", make_data())
    assert (code, errors) == (0, "")
    assert "3 samples" in shown
    assert "can be used as they are" in shown


def test_a_missing_image_gives_code_1_and_is_named(call, make_data):
    code, shown, _ = call("data", "check", "--run", make_data(drop=[1]), "--json")
    assert code == 1
    report = json.loads(shown)
    assert not report["ok"]
    (one,) = report["sets"]
    assert (one["name"], one["num_samples"], one["num_usable"]) == ("pretrain", 3, 2)
    (bad,) = [image for source in one["sources"] for image in source["bad_images"]]
    assert (bad["name"], bad["reason"]) == ("1.png", "missing")


def test_a_cut_image_and_copies_are_found_by_the_full_check_alone(call, make_data, tmp_path):
    run = make_data()
    file = tmp_path / "images/1.png"
    file.write_bytes(file.read_bytes()[:-500])
    assert call("data", "check", "--run", run)[0] == 0
    code, shown, _ = call("data", "check", "--run", run, "--full", "--json")
    report = json.loads(shown)
    assert code == 1
    assert report["sets"][0]["sources"][0]["bad"] == {"truncated": 1}
    assert report["duplicates"] == [["0.png", "2.png"]]


@pytest.mark.parametrize(
    ("sub_images", "lengths"),
    # <s>, k = 4 slots a sub-image and a separator a slice, the caption's letters, </s>.
    [("all", [1 + 4 + 5 + 1, 1 + 3 * 4 + 2 + 11 + 1, 1 + 4 + 4 + 1]), ("global", [11, 1 + 4 + 11 + 1, 10])],
)
def test_samples_longer_than_their_stage_takes_are_told(call, make_data, sub_images, lengths):
    run = make_data(pretrain={"sub_images": sub_images})

    def over_long(max_length):
        # The status is 1 if a sample's images alone are too long, as the stage leaves it out.
        _, shown, _ = call("data", "check", "--run", run, "--json", f"pretrain.max_length={max_length}")
        return json.loads(shown)["sets"][0]["over_long"]

    for i, length in enumerate(lengths):
        assert f"s{i}" not in over_long(length)
        assert f"s{i}" in over_long(length - 1)


def test_a_run_that_cannot_be_checked_gives_code_2(call, write_run):
    code, shown, errors = call("data", "check", "--run", write_run("name: a"))
    assert (code, shown) == (2, "")
    assert "names no samples" in errors
    code, _, errors = call("data", "check", "--run", write_run("dat: {}"))
    assert code == 2
    assert "unknown setting dat" in errors


def test_a_study_is_valid_where_each_of_its_variants_is(call):
    code, shown, _ = call("config", "validate", "--run", "demo_ablations")
    assert code == 0
    assert "14 variants in its study" in shown
    code, _, message = call("config", "validate", "--run", "demo_ablations", "study.grid={projector.settings.k: [0]}")
    assert code == 2
    assert "k is 0" in message
