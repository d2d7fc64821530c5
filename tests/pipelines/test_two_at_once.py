"""The same command started twice: the newer start goes on, the older one stops with one clear line, results do not mix."""

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from kills import actors, command
from mlflow import MlflowClient
from towers import write_clip

from meteor import storage
from meteor.checkpoint.folder import complete_checkpoints
from meteor.errors import CheckpointError
from meteor.model.trained_projector import load_trained_projector
from meteor.runs.reading import read_stage
from meteor.runs.verify import verify
from meteor.tracking import Tracker

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def write_run(make_settings, tmp_path):
    """Write a run file; with an S3 root the outputs and caches are there."""

    def write(name, root=None, **changes):
        content = make_settings(name=name, **changes).model_dump(mode="json")
        content["output"] = f"{root or tmp_path}/{name}"
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content))
        return file

    return write


def start(stage, run_file, log):
    return subprocess.Popen(command(stage, run_file), stdout=log.open("w"), stderr=subprocess.STDOUT)


def wait_until(ready, *, timeout_s=240.0):
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.1)


def run(stage, run_file):
    return subprocess.run(command(stage, run_file), check=True, capture_output=True, text=True).stdout


def assert_superseded(log, code):
    """The older start ended with status 2 and one line, without a traceback."""
    text = log.read_text()
    assert code == 2, text
    last = text.rstrip().splitlines()[-1]
    assert last.startswith("SupersededError: "), text
    assert "was taken over by a newer start (process " in last
    assert "Traceback" not in text


def start_twice(stage, run_file, is_working, tmp_path):
    """Start a command, and again when the first start is at work; return the outputs of both."""
    logs = [tmp_path / "older.log", tmp_path / "newer.log"]
    older = start(stage, run_file, logs[0])
    wait_until(lambda: is_working(older) or older.poll() is not None)
    assert older.poll() is None, f"the command ended before the second start: {logs[0].read_text()}"
    newer = start(stage, run_file, logs[1])
    started = time.monotonic()
    code = older.wait(timeout=300)
    assert time.monotonic() - started < 240
    assert newer.wait(timeout=600) == 0, logs[1].read_text()
    assert_superseded(logs[0], code)
    return [log.read_text() for log in logs]


def folder_of(tmp_path, name, stage):
    [found] = (tmp_path / name / "runs").glob(f"{stage}-*")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_training_that_is_started_twice_reports_what_one_start_reports(write_run, tmp_path, num_workers):
    changes = {
        "pretrain": {"epochs": 120, "checkpoint_every_steps": 10},
        "cache": {"uri": str(tmp_path / "cache"), "rows_per_file": 8},
        "runtime": {"num_workers": num_workers},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "e"},
    }
    once, twice = (write_run(name, **changes) for name in ("once", "twice"))
    Tracker(changes["tracking"]["uri"], "e")
    run("cache_features", once)
    run("pretrain", once)

    def is_working(older):
        folders = list((tmp_path / "twice" / "runs").glob("pretrain-*"))
        return folders and len(complete_checkpoints(f"{folders[0]}/checkpoints")) >= 1

    start_twice("pretrain", twice, is_working, tmp_path)

    one, other = (read_stage(str(folder_of(tmp_path, name, "pretrain"))) for name in ("once", "twice"))
    assert [row["loss"] for row in other.metrics] == [row["loss"] for row in one.metrics]
    assert other.summary["counts"]["loss_last"] == one.summary["counts"]["loss_last"]
    assert [problem for outcome in verify(str(tmp_path / "twice")) for problem in outcome.problems] == []
    client = MlflowClient(tracking_uri=changes["tracking"]["uri"])
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert {found.info.status for found in runs if found.data.tags.get("meteor.run") == "twice"} == {"FINISHED"}
    [found] = [found for found in runs if found.data.tags.get("meteor.run") == "twice"]
    assert found.data.metrics["loss"] == pytest.approx(one.metrics[-1]["loss"])


@pytest.mark.slow
def test_a_caching_that_is_started_twice_has_every_image_once(write_run, small, tmp_path):
    clip = write_clip(tmp_path / "clip", small, width=1024, num_layers=24)
    changes = {"vision": {"path": clip}, "slicing": {"resolution": 56, "max_slices": 16}}
    twice = write_run("twice", cache={"rows_per_file": 1}, **changes)
    start_twice("cache_features", twice, lambda older: actors(older, "Encoder"), tmp_path)
    summary = json.loads((folder_of(tmp_path, "twice", "cache_features") / "summary.json").read_text())
    assert summary["counts"]["images_cached"] == summary["counts"]["distinct_images"]


@pytest.mark.slow
def test_an_evaluation_that_is_started_twice_answers_every_question(write_run, tmp_path):
    twice = write_run("twice", evaluate={"max_new_tokens": 256, "limit": None, "batch_size": 1})
    for stage in ("cache_features", "pretrain", "finetune"):
        run(stage, twice)
    start_twice("evaluate", twice, lambda older: actors(older, "AnswerActor"), tmp_path)
    record = read_stage(str(folder_of(tmp_path, "twice", "evaluate")))
    scores = json.loads(Path(record.uri, "scores.json").read_text())
    assert scores["scenes"]["num_questions"] == record.summary["counts"]["questions"]


@pytest.mark.slow
def test_a_study_that_is_started_twice_is_finished_by_one_start(write_run, tmp_path):
    twice = write_run(
        "twice",
        pretrain={"epochs": 100},
        study={"variants": {"a": {}, "b": {"finetune.lr": 1e-3}}, "measure_questions": 0, "parallel": 1},
    )
    start_twice("ablate", twice, lambda older: actors(older, "RayTrainWorker"), tmp_path)
    assert [problem for outcome in verify(str(tmp_path / "twice")) for problem in outcome.problems] == []


@pytest.mark.slow
def test_two_reports_at_once_leave_one_whole_report(write_run, tmp_path):
    twice = write_run("twice")
    for stage in ("cache_features", "pretrain"):
        run(stage, twice)
    both = [start("report", twice, tmp_path / f"{number}.log") for number in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    first = {file: file.read_bytes() for file in (tmp_path / "twice" / "report").rglob("*") if file.is_file()}
    run("report", twice)
    assert first == {file: file.read_bytes() for file in first}


@pytest.mark.s3
def test_a_training_on_an_object_store_that_is_started_twice_is_finished_by_one_start(write_run, tmp_path, ceph_root):
    twice = write_run("twice", root=ceph_root, pretrain={"epochs": 60, "checkpoint_every_steps": 4})
    run("cache_features", twice)
    out = f"{ceph_root}/twice"
    start_twice("pretrain", twice, lambda older: complete_checkpoints(f"{out}/runs"), tmp_path)
    files = [info.uri for info in storage.list_objects(f"{out}/runs")]
    [uri] = [file.removesuffix("/run.json") for file in files if "pretrain-" in file and file.endswith("/run.json")]
    record = read_stage(uri)
    assert [row["step"] for row in record.metrics] == list(range(1, record.summary["counts"]["steps"] + 1))
    assert [problem for outcome in verify(out) for problem in outcome.problems] == []
    # One flipped bit in the projector.
    projector = record.summary["results"]["projector"]
    data = bytearray(storage.read_bytes(projector))
    data[-5] ^= 1
    storage.write_bytes(projector, bytes(data))
    assert "does not match its checksum" in " ".join(problem for outcome in verify(out) for problem in outcome.problems)
    with pytest.raises(CheckpointError, match="do not match their digest"):
        load_trained_projector(projector, device="cpu", dtype=torch.float32)
