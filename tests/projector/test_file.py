"""Projector files, and a projector's tensors read out of files that hold much else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteor import storage
from meteor.errors import CheckpointError, NotFoundError, StorageError
from meteor.projector import build_projector
from meteor.projector.file import (
    load_weights,
    read_model_weights,
    read_projector_file,
    read_tensors,
    write_projector_file,
)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """All kinds of shapes and types, in an order that no file has them in."""
    return {
        "projector.b.weight": torch.randn(3, 5),
        "language_model.a": torch.randn(7).bfloat16(),
        "projector.a": torch.arange(5, dtype=torch.int64),
        "projector.scalar": torch.tensor(2.5, dtype=torch.float16),
        "projector.empty": torch.zeros(0, 4),
        "projectors.other": torch.ones(3),
        "projector.flags": torch.tensor([True, False, True]),
        "vision_tower.z": torch.randn(2, 2),
    }


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in wanted.items()
    )


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_what_is_written_is_read_by_us_and_by_safetensors(tensors, tmp_path, place, request) -> None:
    root = str(tmp_path) if place == "disk" else request.getfixturevalue("s3_root")
    uri, description = storage.join(root, "projector.safetensors"), {"projector": {"name": "mlp"}, "llm_width": 7}
    write_projector_file(uri, tensors, description)
    found, weights = read_projector_file(uri)
    assert found == description
    assert equal(weights, tensors)
    storage.download_file(uri, str(tmp_path / "local"))
    assert equal(load_file(tmp_path / "local"), tensors)


def chosen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("projector."): value for name, value in tensors.items() if name.startswith("projector.")}


def test_of_a_large_file_only_the_tensors_asked_for_are_read(tensors, tmp_path: Path, monkeypatch) -> None:
    tensors = {**tensors, "language_model.large": torch.zeros(100_000)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    num_bytes, read = 0, storage.read_range

    def count(uri: str, start: int, size_bytes: int) -> bytes:
        nonlocal num_bytes
        num_bytes += size_bytes
        return read(uri, start, size_bytes)

    monkeypatch.setattr(storage, "read_range", count)
    monkeypatch.setattr(storage, "read_bytes", None)
    metadata, found = read_tensors(str(tmp_path / "model.safetensors"), "projector.")
    assert metadata == {"format": "pt"}
    assert equal(found, chosen(tensors))
    assert num_bytes < 4000


def test_the_index_of_a_sharded_model_says_which_files_to_open(tensors, tmp_path: Path) -> None:
    names = list(tensors)
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    places["language_model.b"] = "model-9.safetensors"  # not there: need not be
    for file in ("model-0.safetensors", "model-1.safetensors"):
        save_file({name: tensors[name] for name in names if places[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert equal(read_model_weights(str(tmp_path), "projector."), chosen(tensors))
    places["projector.missing"] = "model-0.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match="contradicts its index: missing; copy it again"):
        read_model_weights(str(tmp_path), "projector.")


@pytest.mark.parametrize(
    "content",
    [
        b"no tensors at all, but text that goes on for a while",
        bytes(64),
        (2).to_bytes(8, "little") + b"[]",
        (13).to_bytes(8, "little") + b'{"a": "twelve"}',
        (10).to_bytes(8, "little") + b'{"a": {}} ',
        (72).to_bytes(8, "little")
        + b'{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}'.ljust(72)
        + bytes(4),
    ],
)
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file is no safetensors file \(.*give the projector.safetensors"):
        read_projector_file(str(tmp_path / "file"))


def test_a_missing_and_a_cut_file_are_told_apart(tensors, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing does not exist"):
        read_projector_file(str(tmp_path / "nothing"))
    uri = str(tmp_path / "file")
    write_projector_file(uri, tensors, {})
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-1])
    with pytest.raises(StorageError, match="the file was cut short"):
        read_projector_file(uri)


def test_a_description_that_is_none_is_refused(tensors, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "plain")
    assert read_projector_file(str(tmp_path / "plain"))[0] == {}
    for text in ("{half", "3"):
        save_file(tensors, tmp_path / "damaged", metadata={"meteor": text})
        with pytest.raises(CheckpointError, match="its metadata is damaged"):
            read_projector_file(str(tmp_path / "damaged"))


def test_weights_are_taken_whole_or_not_at_all() -> None:
    projector = build_projector("mlp", vision_width=4, llm_width=6).bfloat16()
    weights = {name: torch.randn(value.shape) for name, value in projector.state_dict().items()}
    load_weights(projector, weights, "there")
    assert equal(projector.state_dict(), {name: value.bfloat16() for name, value in weights.items()})
    lacking = {name: value for name, value in weights.items() if name != "mlp.0.bias"}
    for changed, name in [
        (lacking, "mlp.0.bias"),
        ({**weights, "extra": torch.zeros(1)}, "extra"),
        ({**weights, "mlp.2.weight": torch.zeros(6, 5)}, "mlp.2.weight"),
    ]:
        with pytest.raises(CheckpointError, match=f"there does not fit the projector that its settings make: {name}$"):
            load_weights(projector, changed, "there")
