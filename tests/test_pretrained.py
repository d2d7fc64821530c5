import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from meteor import storage
from meteor.errors import SettingsError
from meteor.pretrained import load_pretrained, local_model
from meteor.text.tokenizer import load_tokenizer
from meteor.train.build import llm_fingerprint


def load(path, model_class=AutoModelForCausalLM, **options):
    return load_pretrained(model_class, str(path), setting="llm.path", example="lmsys/vicuna-7b-v1.5", **options)


@pytest.fixture
def make_folder(llm_folder, tmp_path):
    """A copy of the language model whose tensors went through ``change``."""

    def make(change, name="copy"):
        folder = shutil.copytree(llm_folder, tmp_path / name)
        weights = change(load_file(f"{llm_folder}/model.safetensors"))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def without(weights, part):
    return {name: value for name, value in weights.items() if part not in name}


def test_a_whole_checkpoint_loads_exactly(llm_folder):
    model = load(llm_folder)
    weights = load_file(f"{llm_folder}/model.safetensors")
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)


@pytest.mark.parametrize(("part", "count"), [("layers.1.", 9), ("lm_head.weight", 1), ("model.norm", 1)])
def test_a_checkpoint_that_lacks_weights_is_refused(make_folder, part, count):
    folder = make_folder(lambda weights: without(weights, part))
    with pytest.raises(SettingsError, match=rf"llm\.path='{folder}' lacks {count} weights of LlamaForCausalLM.*{part}"):
        load(folder)


def test_a_checkpoint_of_other_shapes_is_refused(make_folder):
    folder = make_folder(lambda weights: {**weights, "model.norm.weight": torch.ones(7)})
    with pytest.raises(SettingsError, match=r"llm\.path="):
        load(folder)


def test_weights_of_other_parts_are_left_out_without_a_word(make_folder, capsys, caplog):
    folder = make_folder(lambda weights: {**weights, "text_model.head": torch.ones(3)})
    assert "text_model" not in str(load(folder).state_dict().keys())
    assert "text_model" not in caplog.text + "".join(capsys.readouterr())


def test_tied_weights_are_not_missing(tmp_path):
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def as_bin(llm_folder, tmp_path, weights):
    folder = shutil.copytree(llm_folder, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def test_a_file_that_was_cut_short_is_refused(make_folder):
    folder = make_folder(dict)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(SettingsError, match=r"llm\.path="):
        load(folder)


def test_a_bin_file_loads(llm_folder, tmp_path):
    weights = load_file(f"{llm_folder}/model.safetensors")
    model = load(as_bin(llm_folder, tmp_path, weights))
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)


class Payload:
    """Runs a command where it is unpickled without care."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_bin_file_with_code_is_refused_and_not_run(llm_folder, tmp_path):
    weights = load_file(f"{llm_folder}/model.safetensors")
    folder = as_bin(llm_folder, tmp_path, {**weights, "extra": Payload(tmp_path / "executed")})
    with pytest.raises(SettingsError, match=r"llm\.path="):
        load(folder)
    assert not (tmp_path / "executed").exists()


def test_code_that_a_directory_brings_is_not_run(llm_folder, tmp_path):
    folder = Path(shutil.copytree(llm_folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})")
    with pytest.raises(SettingsError, match=r"llm\.path="):
        load(folder)
    assert not (tmp_path / "executed").exists()


def test_a_path_where_nothing_is_names_setting_and_example(tmp_path):
    with pytest.raises(SettingsError, match=r"llm\.path='.*nowhere' cannot be loaded.*such as lmsys/vicuna-7b-v1\.5"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match=r"llm\.path='.*empty' cannot be loaded"):
        load(tmp_path / "empty")


def test_a_directory_with_another_model_is_refused(llm_folder, clip_folder):
    with pytest.raises(SettingsError, match=r"llm\.path="):
        load(clip_folder)
    with pytest.raises(SettingsError, match=r"lacks .* weights of CLIPVisionModel"):
        load(llm_folder, CLIPVisionModel)


def test_a_model_in_an_object_store_is_copied_once_to_the_node(
    llm_folder, tokenizer_folder, s3_root, tmp_path, monkeypatch
):
    monkeypatch.setenv("METEOR_MODELS", str(tmp_path / "models"))
    uri = f"{s3_root}/vicuna"
    for folder in (llm_folder, tokenizer_folder):
        for file in Path(folder).iterdir():
            storage.upload_file(str(file), f"{uri}/{file.name}")
    local_model.cache_clear()
    model, weights = load(uri), load_file(f"{llm_folder}/model.safetensors")
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)
    assert load_tokenizer(uri).get_vocab() == load_tokenizer(tokenizer_folder).get_vocab()
    assert llm_fingerprint(uri) == llm_fingerprint(local_model(uri))
    [copy] = [path for path in (tmp_path / "models").iterdir() if path.is_dir()]
    (copy / "config.json").write_text("{}")  # another process finds the copy, and does not make it again
    local_model.cache_clear()
    assert local_model(uri + "/") == str(copy)
    assert (copy / "config.json").read_text() == "{}"


def test_a_copy_that_was_broken_off_is_made_again(llm_folder, s3_root, tmp_path, monkeypatch):
    monkeypatch.setenv("METEOR_MODELS", str(tmp_path / "models"))
    uri = f"{s3_root}/vicuna"
    for file in Path(llm_folder).iterdir():
        storage.upload_file(str(file), f"{uri}/{file.name}")
    real, calls = storage.download_file, []

    def cut(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(storage, "download_file", cut)
    local_model.cache_clear()
    with pytest.raises(KeyboardInterrupt):
        local_model(uri)
    monkeypatch.setattr(storage, "download_file", real)
    assert sorted(os.listdir(local_model(uri))) == sorted(os.listdir(llm_folder))


def test_an_object_store_without_the_model_is_said(s3_root):
    local_model.cache_clear()
    with pytest.raises(SettingsError, match=r"nothing holds no model: there is no config.json among its 0 files"):
        load(f"{s3_root}/nothing")
