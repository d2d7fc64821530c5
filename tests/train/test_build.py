import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from meteor.errors import CheckpointError, NotFoundError, SettingsError
from meteor.model import MeteorConfig
from meteor.model.trained_projector import projector_metadata
from meteor.projector.file import write_projector_file
from meteor.train.build import build_model, freeze_for, llm_fingerprint, load_projector
from meteor.vision.encoder import read_vision_config

IDENTITY = {"encoder_digest": "e" * 64, "select_layer": -2}


@pytest.fixture
def build(llm_folder, clip_folder):
    def make(**changes):
        settings = {
            "llm_path": llm_folder,
            "vision_config": read_vision_config(clip_folder),
            "projector": {"name": "meteor", "k": 4},
            "select_layer": -2,
            "cache_identity": IDENTITY,
            "dtype": torch.float32,
            "seed": 0,
            "image_token_id": 32000,
        }
        return build_model(**{**settings, **changes})

    return make


def test_a_stage_starts_from_the_language_models_weights_and_a_new_projector(build, llm_folder):
    model = build()
    truth = AutoModelForCausalLM.from_pretrained(llm_folder)
    torch.testing.assert_close(model.language_model.state_dict(), truth.state_dict(), rtol=0, atol=0)
    assert model.vision_tower is None
    assert (model.config.cache_identity, model.config.select_layer) == (IDENTITY, -2)
    assert model.projector.settings["k"] == 4
    assert (model.config.vision_config.hidden_size, model.config.text_config.hidden_size) == (16, 32)


def test_the_seed_decides_about_the_projector(build):
    first, same, other = (build(seed=seed).projector.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_all_weights_have_the_type_asked_for(build):
    assert {parameter.dtype for parameter in build(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_text_guided_sampler_stands_in_the_middle_unless_told(build):
    # Of the two layers the first, as one must come after it.
    for given in (None, 0):
        sampler = build(text_sampler={"layer": given, "keep": 0.5}).text_sampler
        assert (sampler.layer, sampler.keep) == (0, 0.5)
    assert build().text_sampler is None


def test_a_language_model_that_is_not_there_is_named_by_its_setting(build, tmp_path):
    with pytest.raises(SettingsError, match=r"llm\.path="):
        build(llm_path=str(tmp_path))


@pytest.mark.parametrize(
    ("stage", "rooms"), [("pretrain", {"projector"}), ("finetune", {"projector", "language_model"})]
)
def test_each_stage_trains_its_rooms_whole_and_nothing_else(make_model, stage, rooms):
    model = make_model(vision_tower=True)
    # What the other stage did before must not linger.
    freeze_for(model, "finetune" if stage == "pretrain" else "pretrain")
    freeze_for(model, stage)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] in rooms), name


def write_projector(model, file, metadata=None, drop=()):
    weights = {name: value.clone() for name, value in model.projector.state_dict().items() if name not in drop}
    content = projector_metadata(model.config) if metadata is None else metadata
    write_projector_file(str(file), weights, content)
    return str(file)


def test_a_stage_one_projector_is_taken_over_in_the_type_of_the_model(build, tmp_path):
    trained = build(seed=5)
    model = build(dtype=torch.bfloat16)
    load_projector(model, write_projector(trained, tmp_path / "projector.safetensors"))
    for name, value in model.projector.state_dict().items():
        assert torch.equal(value, trained.projector.state_dict()[name].bfloat16()), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": {"name": "meteor", "k": 5}}, r"projector: .*'k': 4.* there, .*'k': 5.* here"),
        ({"projector": {"name": "mlp"}}, "projector: "),
        ({"cache_identity": {**IDENTITY, "encoder_digest": "f" * 64}}, f"cache_identity: .*{'e' * 64}.*{'f' * 64}"),
        ({"select_layer": -1}, "select_layer: -2 there, -1 here"),
    ],
)
def test_a_projector_of_other_settings_is_refused_naming_what_differs(build, tmp_path, changes, message):
    uri = write_projector(build(), tmp_path / "projector.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_projector(build(**changes), uri)
    unchanged = projector_metadata(build().config).keys() - changes.keys()
    assert not [name for name in unchanged if f"{name}:" in str(caught.value)]


def test_a_projector_file_that_is_none_is_refused(build, tmp_path):
    model = build()
    with pytest.raises(NotFoundError, match=r"nothing\.safetensors does not exist"):
        load_projector(model, str(tmp_path / "nothing.safetensors"))
    (tmp_path / "text").write_text("no tensors at all, but text that goes on for a while")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        load_projector(model, str(tmp_path / "text"))
    uri = write_projector(model, tmp_path / "no_settings", metadata={})
    with pytest.raises(CheckpointError, match="projector: None there"):
        load_projector(model, uri)
    uri = write_projector(model, tmp_path / "a_tensor_short", drop={"instruction"})
    with pytest.raises(CheckpointError, match="does not fit the projector that its settings make: instruction"):
        load_projector(model, uri)


def test_a_tensor_of_another_shape_is_refused_by_name(build, tmp_path):
    model = build()
    weights = {name: value.clone() for name, value in model.projector.state_dict().items()}
    weights["instruction"] = torch.zeros(1, 9)
    write_projector_file(str(tmp_path / "file"), weights, projector_metadata(model.config))
    with pytest.raises(CheckpointError, match="settings make: instruction"):
        load_projector(model, str(tmp_path / "file"))


def test_the_fingerprint_is_of_the_content_not_of_the_place(llm_folder, tmp_path):
    moved = shutil.copytree(llm_folder, tmp_path / "elsewhere")
    assert llm_fingerprint(str(moved)) == llm_fingerprint(llm_folder)


def test_any_changed_weight_changes_the_fingerprint(llm_folder, tmp_path):
    weights = load_file(f"{llm_folder}/model.safetensors")
    fingerprints = {llm_fingerprint(llm_folder)}
    for name in weights:
        copy = shutil.copytree(llm_folder, tmp_path / name)
        changed = weights[name].clone()
        changed.view(-1)[-1] += 1
        save_file({**weights, name: changed}, copy / "model.safetensors", metadata={"format": "pt"})
        fingerprints.add(llm_fingerprint(str(copy)))
    assert len(fingerprints) == 1 + len(weights)


def test_a_changed_configuration_changes_the_fingerprint(llm_folder, tmp_path):
    copy = shutil.copytree(llm_folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 5}))
    assert llm_fingerprint(str(copy)) != llm_fingerprint(llm_folder)


def test_in_a_large_file_a_tuned_matrix_in_the_middle_is_noticed(tmp_path):
    # 160 MiB in a sparse file: one matrix of 1 MiB differs.
    fingerprints = set()
    for position in (None, 1 << 20, 79 << 20, 158 << 20):
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.truncate(160 << 20)
            if position is not None:
                file.seek(position)
                file.write(b"\1" * (1 << 20))
        fingerprints.add(llm_fingerprint(str(tmp_path)))
    assert len(fingerprints) == 4


def test_the_metadata_of_a_projector_names_what_it_was_trained_for(build):
    model = build()
    assert isinstance(model.config, MeteorConfig)
    assert projector_metadata(model.config) == {
        "projector": {"name": "meteor", "k": 4},
        "vision_width": 16,
        "llm_width": 32,
        "select_layer": -2,
        "cache_identity": IDENTITY,
    }
