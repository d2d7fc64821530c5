"""Names that come from data stay below their folder, wherever they are written or read."""

import ast
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from meteor import pretrained, storage
from meteor.data.roots import resolve_image
from meteor.errors import ImagePathError, UnsafeNameError
from meteor.evaluation.question_images import write_images
from meteor.projector.file import read_model_weights

BAD = {
    "": "is empty",
    ".": "is empty",
    "./": "is empty",
    "/etc/passwd": "is absolute",
    "~/.ssh/authorized_keys": "is absolute",
    "s3://other/key": "is absolute",
    "..": "leads out",
    "a/../../b": "leads out",
    "a/..": "leads out",
    "C:/windows/x": "has a drive",
    "c:x": "has a drive",
    "a\0b": "has a drive or a NUL",
    "a/" + "x" * 256: "is too long",
    "é" * 128: "is too long",
    "a/" * 600: "is too long",
    "\ud83d.png": "has half of a surrogate pair",
}


@pytest.mark.parametrize("root", ["/data/images", "s3://bucket/images"])
@pytest.mark.parametrize("name", BAD)
def test_names_that_lead_out_or_name_no_file_are_refused(root, name):
    with pytest.raises(UnsafeNameError, match=BAD[name]) as caught:
        storage.join_below(root, name)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "name", ["a.png", "a/b c/..d", "a//b/./c", "...", "x" * 255, "ünï/画像.png", "a/\\b", "9:16.png"]
)
def test_other_names_are_joined(name):
    assert storage.join_below("/data", name) == os.path.normpath(f"/data/{name}")
    assert storage.join_below("s3://bucket", name).startswith("s3://bucket/")


PARTS = st.sampled_from(["..", ".", "", "a", "/", "//", "~", "\0", "C:", "\\", "é", "s3:", "\ud800", "x" * 300])


@given(st.one_of(st.text(), st.lists(PARTS).map("/".join), st.lists(PARTS).map("".join)))
def test_whatever_the_name_it_stays_below_or_is_refused(name):
    try:
        uri = storage.join_below("/data/images", name)
    except UnsafeNameError:
        return
    assert os.path.normpath(uri) == uri
    assert uri.startswith("/data/images/")
    assert len(os.fsencode(os.path.basename(uri))) <= 255


@given(st.one_of(st.text(), st.lists(PARTS).map("/".join)))
def test_an_image_name_is_resolved_inside_its_root_or_refused_by_its_own_error(name):
    try:
        uri = resolve_image(name, {"": "/data/images"})
    except ImagePathError:
        return
    assert os.path.normpath(uri).startswith("/data/images/")


def test_a_model_on_an_object_store_writes_nothing_outside_its_copy(tmp_path, monkeypatch, s3_root):
    monkeypatch.setenv("METEOR_MODELS", str(tmp_path / "deep/models"))
    storage.write_bytes(f"{s3_root}/llm/config.json", b"{}")
    listed = storage.list_objects(f"{s3_root}/llm")
    evil = [storage.ObjectInfo(f"{s3_root}/llm/../../../evil", 4, "e", 0.0)]
    monkeypatch.setattr(storage, "list_objects", lambda uri: listed + evil)
    with pytest.raises(UnsafeNameError, match="leads out of its folder"):
        pretrained.local_model(f"{s3_root}/llm")
    assert not [path for path in tmp_path.rglob("*") if path.name in ("evil", "config.json")]


def test_a_finished_model_on_an_object_store_keeps_its_folders(tmp_path, s3_root):
    # The adapters of stage 2 lie in a folder of their own, whose config.json is not that of the model.
    for name in ("config.json", "adapter/adapter_config.json"):
        storage.write_bytes(f"{s3_root}/model/{name}", name.encode())
    assert pretrained.download_folder(f"{s3_root}/model", str(tmp_path)) == 2
    assert (tmp_path / "adapter/adapter_config.json").read_bytes() == b"adapter/adapter_config.json"


def test_an_image_inside_a_table_is_written_below_its_root_or_left_out(tmp_path):
    sink = io.BytesIO()
    Image.new("RGB", (8, 8)).save(sink, "PNG")
    images = {"good.png": sink.getvalue(), "../../evil.png": b"x", "/evil.png": b"x", "a/" + "x" * 300: b"x"}
    written = []
    questions = SimpleNamespace(
        image_root=str(tmp_path / "deep/below"), embedded=images.items, resized={}, long_side=None, sources={}
    )
    write_images(questions, {}, max_pixels=1000, on_written=written.append)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["deep/below/good.png", "deep/below/written.json"]


def test_an_index_of_weights_cannot_name_files_of_others(tmp_path):
    (tmp_path / "model").mkdir()
    index = {"weight_map": {"projector.a": "../secret.safetensors"}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeNameError, match="leads out"):
        read_model_weights(str(tmp_path / "model"), "projector.")


def test_values_of_records_are_joined_by_join_below_alone():
    """A value that is taken out of a record or table by its key comes from data; `join` takes it as it is."""
    root = Path(__file__).parents[2]
    found = []
    for file in (file for folder in ("meteor", "pipelines", "jobs") for file in (root / folder).rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("storage.join", "os.path.join"):
                keyed = [part for part in ast.walk(call) if isinstance(part, ast.Subscript)]
                if any(isinstance(part.slice, ast.Constant) and isinstance(part.slice.value, str) for part in keyed):
                    found.append(f"{file.relative_to(root)}:{call.lineno}: {ast.unparse(call)}")
    # The number of a step, formatted as one.
    assert [line for line in found if "error.failure['step']:08d" not in line] == []
