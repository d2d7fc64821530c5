"""What the preflight finds, on one node, when something is not as it must be."""

import json
import shutil
import socket
from pathlib import Path

import pytest

from jobs.node_checks import Finding, check_node, differing
from jobs.preflight import report
from meteor import storage
from meteor.config import RunSettings

# MLflow's and SQLAlchemy's own.
pytestmark = pytest.mark.filterwarnings("ignore")
TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]


@pytest.fixture
def settings(make_image, png, clip_folder, llm_folder, tokenizer_folder, tmp_path):
    """A run of which everything is there."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "0.png").write_bytes(png(make_image(20, 20)))
    llm = shutil.copytree(llm_folder, tmp_path / "llm")
    for file in Path(tokenizer_folder).iterdir():
        shutil.copy(file, llm)
    (tmp_path / "samples.json").write_text(json.dumps([{"id": "0", "image": "0.png", "conversations": TURNS}]))
    return {
        "output": str(tmp_path / "out"),
        "data": {"roots": {"": str(images)}, "finetune": str(tmp_path / "samples.json")},
        "vision": {"path": clip_folder},
        "llm": {"path": str(llm)},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    }


def look(settings, *, num_nodes=1, is_driver=True, marker=True):
    run = RunSettings.model_validate(settings)
    uri = storage.join(run.output, "preflight", "marker")
    if marker:
        storage.write_bytes(uri, b"")
    return {one.check: one for one in check_node(run, num_nodes, uri, is_driver=is_driver)}


def test_a_run_of_which_all_is_there_is_ready_and_nothing_is_left_behind(settings):
    found = look(settings)
    assert [one for one in found.values() if not one.ok] == []
    assert list(found) == ["name", "storage", "encoder", "language model", "disk", "MLflow", "data", "images"]
    assert [info.uri.rpartition("/")[2] for info in storage.list_objects(settings["output"])] == ["marker"]


def test_on_s3_too(settings, s3_root):
    assert look({**settings, "output": f"{s3_root}/out"})["storage"].ok


def test_a_folder_that_another_node_does_not_see_is_no_output(settings):
    found = look(settings, num_nodes=2, marker=False)["storage"]
    assert not found.ok
    assert "give an s3:// prefix" in found.text


def test_a_store_that_takes_a_second_conditional_put_is_refused(settings, monkeypatch):
    monkeypatch.setattr(storage, "create_bytes", storage.write_bytes)
    found = look(settings)["storage"]
    assert not found.ok
    assert "could be created twice" in found.text


def test_models_and_images_that_are_missing_are_named(settings):
    (Path(settings["data"]["roots"][""]) / "0.png").unlink()
    for weights in Path(settings["llm"]["path"]).glob("*.safetensors"):
        weights.unlink()
    found = look({**settings, "vision": {"path": "s3://nowhere"}}, is_driver=True)
    assert not found["encoder"].ok
    assert found["language model"].text.endswith("has a tokenizer, but no weights (.safetensors or .bin)")
    assert "1 of 1 sampled images are missing" in found["images"].text


def test_several_nodes_need_a_server_and_names_that_lead_to_them(settings, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    found = look({**settings, "tracking": {}}, num_nodes=3)
    assert "set MLFLOW_TRACKING_URI on all nodes" in found["MLflow"].text
    assert "GLOO_SOCKET_IFNAME" in found["name"].text
    alone = look({**settings, "tracking": {}})
    assert alone["MLflow"].ok
    assert alone["name"].ok


def test_a_secret_in_an_error_is_not_printed(settings, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")

    def fail(uri, data):
        raise OSError("signature of not-to-be-seen is wrong")

    marker = storage.write_bytes
    run = RunSettings.model_validate(settings)
    marker(storage.join(run.output, "preflight", "marker"), b"")
    monkeypatch.setattr(storage, "write_bytes", fail)
    found = look(settings, marker=False)["storage"]
    assert not found.ok
    assert found.text == "OSError: signature of *** is wrong"


def test_versions_that_differ_are_told_by_node():
    found = {"a": {"torch": "2.13", "ray": "2.60"}, "b": {"torch": "2.12", "ray": "2.60"}, "c": {"torch": "2.13"}}
    assert differing(found) == ["ray: 2.60 on a, b; absent on c", "torch: 2.13 on a, c; 2.12 on b"]


def test_the_report_fails_where_one_node_does(settings, capsys):
    run = RunSettings.model_validate(settings)
    node = {"findings": [Finding("disk", True, "much")], "gpus": [], "versions": {"ray": "1"}, "resources": {"CPU": 2}}
    assert report(run, {"a": node, "b": node}) == 0
    assert "run: 2 nodes are ready" in capsys.readouterr().out
    assert report(run, {"a": node, "b": {**node, "findings": [Finding("disk", False, "none")]}}) == 1
    assert "FAIL disk: none" in capsys.readouterr().out
    assert (
        report(run.model_copy(update={"runtime": run.runtime.model_copy(update={"num_workers": 9})}), {"a": node}) == 0
    )
    assert (
        "9 training workers with 1 CPU each are requested, and the cluster has 1 node with 2 CPUs"
        in capsys.readouterr().out
    )
