import pytest
from pydantic import ValidationError

from meteor.config import RunSettings, expand_study, load_run, mathematical_settings, resolve_paths, settings_digest
from meteor.config.settings import QuestionSetSettings
from meteor.errors import SettingsError


def make_run(folder, text, name="run.yaml"):
    file = folder / name
    file.write_text(text)
    return str(file)


def test_defaults_are_the_papers_recipe():
    settings = RunSettings()
    assert (settings.pretrain.lr, settings.pretrain.global_batch_size, settings.pretrain.template) == (
        1e-3,
        256,
        "plain",
    )
    assert (settings.finetune.lr, settings.finetune.global_batch_size) == (2e-5, 128)
    assert settings.finetune.template == "vicuna_v1"
    assert (settings.pretrain.warmup_ratio, settings.pretrain.native_warmup) == (0.03, 0.3)
    assert settings.finetune.native_warmup == 0


def test_extends_and_overrides_merge_key_by_key(tmp_path):
    make_run(tmp_path, "pretrain: {lr: 2e-3, seed: 5}\nprojector: {name: meteor, settings: {k: 64}}\n", "base.yaml")
    run = make_run(tmp_path, "extends: base.yaml\npretrain: {seed: 7}\n")
    settings = load_run(run, ["pretrain.micro_batch_size=3", "projector.settings.window=5"])
    assert (settings.pretrain.lr, settings.pretrain.seed, settings.pretrain.micro_batch_size) == (2e-3, 7, 3)
    assert settings.projector.settings == {"k": 64, "window": 5}


@pytest.mark.parametrize("text", ["2e-2", "2E-2", "+2.e-2", ".2e-1", "0.2e-1", "20e-3"])
def test_a_number_with_an_exponent_is_one_wherever_it_stands(tmp_path, text):
    """Projectors' settings have no types that would turn a text into a number."""
    scale = "projector.settings.native_scale"
    run = make_run(
        tmp_path,
        f"projector: {{name: meteor, settings: {{native_scale: {text}}}}}\n"
        f"study: {{variants: {{a: {{{scale}: {text}}}}}, grid: {{projector.settings.visual_weight: [{text}]}}}}\n",
    )
    assert load_run(run).projector.settings == {"native_scale": 0.02}
    assert load_run(make_run(tmp_path, "", "other.yaml"), [f"{scale}={text}"]).projector.settings == {
        "native_scale": 0.02
    }
    assert load_run(run, [f"projector.settings={{native_scale: {text}}}"]).projector.settings == {"native_scale": 0.02}
    [variant] = expand_study(load_run(run))
    assert variant.settings.projector.settings == {"native_scale": 0.02, "visual_weight": 0.02}
    assert load_run(run, ["name='2e2'"]).name == "2e2"


def test_an_override_takes_the_whole_place_of_a_mapping(tmp_path):
    run = make_run(tmp_path, "data: {evaluate: {a: x.json, b: y.json}}\nprojector: {name: meteor, settings: {k: 64}}\n")
    assert load_run(run, ["data.evaluate={}"]).data.evaluate == {}
    assert load_run(run, ["data.evaluate.c=z.json"]).data.evaluate == {
        name: QuestionSetSettings(path=f"{file}.json") for name, file in zip("abc", "xyz", strict=True)
    }
    assert load_run(run, ["projector.name=mlp"]).projector.settings == {}
    assert load_run(run, ["projector.name=meteor_37m", "projector.settings.k=9"]).projector.settings == {"k": 9}


def test_null_leaves_out_a_question_set(tmp_path):
    make_run(tmp_path, "data: {evaluate: {a: x.json, b: y.json}}\n", "base.yaml")
    run = make_run(tmp_path, "extends: base.yaml\ndata: {evaluate: {a: null}}\n")
    assert list(load_run(run).data.evaluate) == ["b"]
    assert load_run(run, ["data.evaluate.b=null"]).data.evaluate == {}


def test_another_projector_does_not_inherit_the_settings_of_the_first(tmp_path):
    make_run(tmp_path, "projector: {name: meteor, settings: {k: 64}}\n", "base.yaml")
    assert load_run(make_run(tmp_path, "extends: base.yaml\nprojector: {name: mlp}\n")).projector.settings == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pretrain: {learning_rate: 1}", r"unknown setting pretrain\.learning_rate = 1.*lr"),
        ("pretrain: {lr: fast}", r"pretrain\.lr = 'fast'"),
        ("pretrain: {lr: -1}", r"pretrain\.lr = -1"),
        ("finetune: {weight_decay: 0.1}", r"finetune\.weight_decay"),
        ("vision: {attention_layers: [3]}", "must contain"),
        ("data: {evaluate: {pretrain: x.json}}", "which is a stage's"),
        ("extends: run.yaml", "circle"),
        ("extends: nothing.yaml", "there is no such file"),
        ("- a\n- b", "mapping"),
        ("a: [", "not valid YAML"),
        ("name: 'a b'", "name = 'a b'"),
    ],
)
def test_a_wrong_run_file_is_refused_with_the_place_and_the_value(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message):
        load_run(make_run(tmp_path, text))


def test_a_wrong_override_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"a\.b=value"):
        load_run(make_run(tmp_path, ""), ["pretrain.lr"])
    with pytest.raises(SettingsError, match="no run file 'nothing'"):
        load_run("nothing")


def test_the_digest_ignores_where_and_how_fast_but_not_what():
    def digest(**changes):
        return settings_digest(mathematical_settings(RunSettings.model_validate(changes)))

    base = digest()
    assert digest(output="elsewhere", runtime={"num_workers": 8}, llm={"path": "other"}) == base
    assert digest(pretrain={"micro_batch_size": 1, "checkpoint_every_steps": 3, "zero_stage": 0}) == base
    assert digest(pretrain={"lr": 2e-3}) != base
    assert digest(slicing={"max_slices": 4}) != base
    assert digest(projector={"settings": {"k": 32}}) != base


def test_local_paths_become_absolute_and_uris_and_hub_ids_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    settings = resolve_paths(
        RunSettings.model_validate(
            {"output": "out", "data": {"roots": {"": "s3://bucket/images"}}, "vision": {"path": "clip"}}
        )
    )
    assert settings.output == str(tmp_path / "out")
    assert settings.data.roots == {"": "s3://bucket/images"}
    assert settings.vision.path == str(tmp_path / "clip")
    assert settings.llm.path == "lmsys/vicuna-7b-v1.5"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("pretrain: {lr: 5e-4}\nfinetune: {lr: 1e-5}\npretrain: {epochs: 3}\n", 3),
        ("pretrain:\n  lr: 5e-4\n  epochs: 2\n  lr: 1e-3\n", 4),
        ("data:\n  evaluate:\n    mine: a.json\n    mine: b.json\n", 4),
        ('data: {roots: {"a": x, a: y}}\n', 1),
    ],
)
def test_a_key_that_is_given_twice_is_refused_with_its_line(tmp_path, text, line):
    with pytest.raises(SettingsError, match=rf"(?s)is given twice.*line {line}"):
        load_run(make_run(tmp_path, text))


def test_merged_mappings_may_be_overridden(tmp_path):
    text = "pretrain: &both {lr: 5e-4, epochs: 2}\nfinetune:\n  <<: *both\n  lr: 1e-5\n"
    run = load_run(make_run(tmp_path, text))
    assert (run.finetune.lr, run.finetune.epochs) == (1e-5, 2)
    # A mapping that merges another is merged itself, before its own place is reached.
    nested = """
data: {evaluate: {one: &one {path: a.json}, deep: &deep {<<: *one, path: b.json}}}
llm: {path: x}
study: {variants: {v: {data.evaluate: {other: {<<: *deep, path: c.json}}}}}
"""
    run = load_run(make_run(tmp_path, nested))
    assert {name: questions.path for name, questions in run.data.evaluate.items()} == {
        "one": "a.json",
        "deep": "b.json",
    }
    with pytest.raises(SettingsError, match="not valid YAML"):
        load_run(make_run(tmp_path, "? [a, b]\n: 1\n? {a: 1}\n: 2\n"))


def test_a_run_file_that_is_no_text_or_too_deep_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(SettingsError, match="is not UTF-8 text"):
        load_run(str(tmp_path / "latin.yaml"))
    with pytest.raises(SettingsError, match="is nested too deeply"):
        load_run(make_run(tmp_path, "a: " + "[" * 5000 + "]" * 5000))


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", "", "a b", "\u00e9"])
def test_names_that_make_no_folder_are_refused(name):
    with pytest.raises(ValidationError):
        RunSettings.model_validate({"name": name})
    with pytest.raises(ValidationError):
        RunSettings.model_validate({"data": {"evaluate": {name: "a.json"}}})
