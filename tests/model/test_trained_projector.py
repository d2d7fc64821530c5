"""A projector without its language model: the same from pretrain's file and from a finished model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from meteor import storage
from meteor.errors import CheckpointError, SettingsError
from meteor.model.trained_projector import load_trained_projector, projector_metadata
from meteor.projector.file import write_projector_file


@pytest.fixture
def model(make_model):
    return make_model({"name": "meteor", "k": 3, "experts": "native"}, vision_tower=True)


@pytest.fixture
def file(model, tmp_path: Path) -> str:
    uri = str(tmp_path / "pretrained" / "projector.safetensors")
    write_projector_file(uri, model.projector.state_dict(), projector_metadata(model.config))
    return uri


@pytest.fixture
def folder(model, tmp_path: Path) -> str:
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def load(uri: str, dtype: torch.dtype = torch.float32):
    return load_trained_projector(uri, device="cpu", dtype=dtype)


def test_file_and_model_directory_give_the_same_projector(model, file: str, folder: str) -> None:
    one, other, beside = load(file), load(folder), load(str(Path(file).parent))
    assert one.digest == other.digest == beside.digest
    assert one.module.settings == model.projector.settings
    for projector in (one, other, beside):
        assert (projector.select_layer, projector.dtype, projector.device.type) == (-2, torch.float32, "cpu")
        assert projector.cache_identity.to_dict() == model.config.cache_identity
        assert not projector.module.training
        torch.testing.assert_close(projector.module.state_dict(), model.projector.state_dict(), rtol=0, atol=0)


def test_the_language_models_weights_are_not_read(model, folder: str, tmp_path: Path) -> None:
    """A sharded model of which everything but the projector's shards is gone."""
    model.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    places = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in places.items() if name.startswith("projector.")}
    gone = set(places.values()) - needed
    assert len(needed) > 1
    assert gone
    for name in gone:
        (tmp_path / "sharded" / name).unlink()
    assert load(str(tmp_path / "sharded")).digest == load(folder).digest


def test_a_model_is_read_from_s3(model, folder: str, s3_root: str) -> None:
    for path in Path(folder).iterdir():
        storage.upload_file(str(path), storage.join(s3_root, "model", path.name))
    assert load(f"{s3_root}/model/").digest == load(folder).digest


def test_weights_take_the_type_asked_for_and_the_digest_is_of_what_is_stored(model, file: str) -> None:
    half = load(file, torch.bfloat16)
    assert half.digest == load(file).digest
    assert {value.dtype for value in half.module.state_dict().values()} == {torch.bfloat16}


def test_weights_settings_layer_and_cache_all_decide_about_the_digest(model, file: str) -> None:
    digests = {load(file).digest}
    weights, metadata = dict(model.projector.state_dict()), projector_metadata(model.config)
    changes = [
        {"projector": {**metadata["projector"], "k": 2}},
        {"select_layer": -1},
        {"cache_identity": {**metadata["cache_identity"], "encoder_digest": "1" * 64}},
    ]
    for change in changes:
        write_projector_file(file, weights, {**metadata, **change})
        digests.add(load(file).digest)
    weights["instruction"] = weights["instruction"] + 1
    write_projector_file(file, weights, metadata)
    digests.add(load(file).digest)
    assert len(digests) == 2 + len(changes)


def test_a_width_that_the_configuration_leaves_to_its_default_is_known(model, folder: str) -> None:
    """Configurations are stored without what equals a default: Vicuna 7B's width, say."""
    config = json.loads(Path(folder, "config.json").read_text())
    del config["text_config"]["hidden_size"]
    Path(folder, "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not fit the projector that its settings make: head"):
        load(folder)  # the default is 4096, the weights are of 32


def test_what_is_no_projector_is_refused_with_what_to_name(model, file: str, folder: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no projector at .*nowhere: give the projector\.safetensors"):
        load(str(tmp_path / "nowhere"))
    (tmp_path / "text").write_text("no tensors at all, but text that goes on for a while")
    with pytest.raises(CheckpointError, match="text is no safetensors file"):
        load(str(tmp_path / "text"))
    save_file({"tokens": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds no trained projector: its metadata lacks projector, vision_width"
    ):
        load(str(tmp_path / "other.safetensors"))
    llama = shutil.copytree(folder, tmp_path / "llama")
    (llama / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="a model of type 'llama', not 'meteor'"):
        load(str(llama))
    for part in ({"text_config": {"model_type": "of_tomorrow"}}, {"vision_config": {"hidden_size": 17}}):
        (llama / "config.json").write_text(json.dumps({"model_type": "meteor", **part}))
        with pytest.raises(CheckpointError, match=r"config\.json is damaged or from a later version \("):
            load(str(llama))
    unknown = {**projector_metadata(model.config), "projector": {"name": "of_tomorrow"}}
    write_projector_file(file, model.projector.state_dict(), unknown)
    with pytest.raises(SettingsError, match="There is no projector 'of_tomorrow'"):
        load(file)
