"""A folder whose model would be read wrongly, or only after minutes not at all, is refused by its configuration already."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from meteor.errors import SettingsError
from meteor.pretrained import load_pretrained
from meteor.text.tokenizer import load_tokenizer
from meteor.train.build import read_llm_config
from meteor.vision.checkpoint import read_vision_config

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9976576152\n"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


def shard(folder: Path, kept: int) -> None:
    """Divide the weights into two shards with an index, and keep some of the shards."""
    weights = list(load_file(folder / "model.safetensors").items())
    halves = [dict(weights[:5]), dict(weights[5:])]
    (folder / "model.safetensors").unlink()
    for name, half in list(zip(SHARDS, halves, strict=True))[:kept]:
        save_file(half, folder / name, metadata={"format": "pt"})
    index = {key: name for name, half in zip(SHARDS, halves, strict=True) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def without_index(folder: Path) -> None:
    shard(folder, 2)
    (folder / "model.safetensors.index.json").unlink()


def with_unreadable_index(folder: Path) -> None:
    shard(folder, 2)
    (folder / "model.safetensors.index.json").write_text("{}")


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


ODD = {
    "weights are a pointer": (
        lambda f: (f / "model.safetensors").write_text(POINTER),
        "1 pointer of Git LFS.*git lfs pull",
    ),
    "config is a pointer": (lambda f: (f / "config.json").write_text(POINTER), "1 pointer of Git LFS.*config.json"),
    "empty weights": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "1 empty file, for example model.safetensors",
    ),
    "empty config": (lambda f: (f / "config.json").write_bytes(b""), "1 empty file, for example config.json"),
    "absent shard": (lambda f: shard(f, 1), f"lacks 1 of 2 files that .*index.json names, for example {SHARDS[1]}"),
    "no index": (without_index, rf"has 2 shards of weights \({SHARDS[0]}\), but no index"),
    "unreadable index": (with_unreadable_index, "has an index that cannot be read.*KeyError: 'weight_map'"),
    "adapters": (lambda f: (f / "adapter_config.json").write_text("{}"), "has adapters .*merge_and_unload"),
    "quantised": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised.*'gptq'",
    ),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "no readable configuration"),
    "types": (lambda f: change_config(f, hidden_size="32"), "no readable configuration.*hidden_size"),
    "list": (lambda f: (f / "config.json").write_text("[1]"), "no readable configuration"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_folder_is_refused_before_its_weights_are_read(llm_folder, tmp_path, name):
    change, words = ODD[name]
    folder = Path(shutil.copytree(llm_folder, tmp_path / "copy"))
    change(folder)
    with pytest.raises(SettingsError, match=rf"(?s)llm\.path='.*copy' .*{words}"):
        read_llm_config(str(folder))
    with pytest.raises(SettingsError, match=r"llm\.path="):
        load_pretrained(AutoModelForCausalLM, str(folder), setting="llm.path", example="x")


def test_whole_folders_load_sharded_or_with_other_files_beside(llm_folder, tmp_path):
    folder = Path(shutil.copytree(llm_folder, tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    shard(folder, 2)
    (folder / "README.md").write_bytes(b"")
    torch.save({}, folder / "training_args.bin")
    model = load_pretrained(AutoModelForCausalLM, str(folder), setting="llm.path", example="x")
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)
    # Plans need a configuration alone.
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert read_llm_config(str(folder)).vocab_size == 64


def test_the_encoders_folder_and_the_tokenizers_are_looked_at_too(clip_folder, tokenizer_folder, tmp_path):
    clip = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    (clip / "model.safetensors").write_text(POINTER)
    with pytest.raises(SettingsError, match=r"vision\.path='.*' has 1 pointer"):
        read_vision_config(str(clip))
    tokenizer = Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))
    whole = (tokenizer / "tokenizer.json").read_text()
    for content, words in (
        (POINTER, "1 pointer of Git LFS"),
        ("", "empty file"),
        (whole[:-200], "No tokenizer can be loaded"),
    ):
        (tokenizer / "tokenizer.json").write_text(content)
        with pytest.raises(SettingsError, match=words):
            load_tokenizer(str(tokenizer))
