"""Kill a running stage with SIGKILL, start it again with the same command: the same result as without the kill."""

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from kills import KILLS, actors, command, kill_driver, kill_session, train_through_kills
from towers import write_clip

from meteor.cache import FeatureCache
from meteor.checkpoint.folder import complete_checkpoints
from meteor.checkpoint.format import KINDS, Checkpoint
from meteor.runs.reading import read_stage


def write_run(folder: Path, name: str, settings) -> Path:
    content = settings.model_dump(mode="json")
    content["output"] = str(folder / name)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def wait_for(started: subprocess.Popen, ready) -> None:
    deadline = time.monotonic() + 240
    while not ready():
        assert started.poll() is None, "the stage ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_encoder(started: subprocess.Popen) -> None:
    (actor,) = actors(started, "Encoder")
    os.kill(actor, signal.SIGKILL)


def cache_in(folder: Path, codec: str = "float16") -> Path:
    (found,) = (folder / "cache").glob(f"*/{codec}")
    return found


def ledger(folder: Path) -> list[Path]:
    return list((folder / "cache").glob("*/*/ledger/features-*"))


def num_encoded(finished: subprocess.CompletedProcess) -> int:
    return int(next(line for line in finished.stdout.splitlines() if "images encoded" in line).split()[-1])


def assert_same_rows(first: FeatureCache, second: FeatureCache) -> None:
    assert first.keys() == second.keys()
    assert len(set(second.keys())) == len(second)
    assert second.verify() == []
    for key in first.keys():  # noqa: SIM118  (a cache is no mapping)
        for a, b in zip(first.get(key).features, second.get(key).features, strict=True):
            assert torch.equal(a, b)


def assert_same_state(checkpoints: str, expected: str) -> None:
    one, other = (Checkpoint(complete_checkpoints(root)[-1]) for root in (expected, checkpoints))
    # Each start has a segment of metrics of its own.
    assert {**one.state, "metrics": None} == {**other.state, "metrics": None}
    for name in one.shapes:
        for kind in KINDS:
            assert torch.equal(one.read(kind, name), other.read(kind, name)), f"{kind} of {name}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("zero_stage", "num_workers"), [(0, 1), (2, 2)])
def test_a_training_that_is_killed_in_every_way_ends_with_the_weights_of_an_undisturbed_one(
    make_settings, tmp_path, zero_stage, num_workers
):
    stage = {"epochs": 100, "checkpoint_every_steps": 2, "zero_stage": zero_stage}
    settings = make_settings(
        pretrain=stage,
        cache={"uri": str(tmp_path / "cache"), "rows_per_file": 8},
        runtime={"num_workers": num_workers, "max_failures": 9},
    )
    straight, killed = (write_run(tmp_path, name, settings) for name in ("straight", "killed"))
    subprocess.run(command("cache_features", straight), check=True)
    subprocess.run(command("pretrain", straight), check=True)
    (undisturbed,) = (tmp_path / "straight").glob("runs/pretrain-*/checkpoints")
    checkpoints = str(tmp_path / "killed" / undisturbed.relative_to(tmp_path / "straight"))
    kills = []
    train_through_kills(command("pretrain", killed), checkpoints, list(KILLS), seed=zero_stage, report=kills.append)
    assert len(kills) == len(KILLS)
    assert_same_state(checkpoints, str(undisturbed))
    rows = [read_stage(str(Path(folder).parent)).metrics for folder in (undisturbed, checkpoints)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("zero_stage", "num_workers"), [(0, 1), (2, 2)])
def test_a_training_whose_newest_checkpoint_is_damaged_ends_with_the_weights_of_an_undisturbed_one(
    make_settings, tmp_path, zero_stage, num_workers
):
    settings = make_settings(
        pretrain={"epochs": 8, "checkpoint_every_steps": 4, "keep_checkpoints": 2, "zero_stage": zero_stage},
        cache={"uri": str(tmp_path / "cache"), "rows_per_file": 8},
        runtime={"num_workers": num_workers},
    )
    straight, damaged = (write_run(tmp_path, name, settings) for name in ("straight", "damaged"))
    for name, file in (("cache_features", straight), ("pretrain", straight), ("pretrain", damaged)):
        subprocess.run(command(name, file), check=True)
    (undisturbed,) = (tmp_path / "straight").glob("runs/pretrain-*")
    folder = tmp_path / "damaged" / undisturbed.relative_to(tmp_path / "straight")
    # As if it had been stopped just before its end, and a bit had been flipped while it lay there.
    (folder / "summary.json").unlink()
    newest = Path(complete_checkpoints(str(folder / "checkpoints"))[-1])
    file = sorted(newest.glob("*/*.safetensors"))[-1]
    data = file.read_bytes()
    file.write_bytes(data[:-9] + bytes([data[-9] ^ 8]) + data[-8:])

    again = subprocess.run(command("pretrain", damaged), check=True, capture_output=True, text=True)

    assert "is damaged (its crc32 does not match); use an older checkpoint. Training goes on from the" in again.stderr
    assert_same_state(str(folder / "checkpoints"), str(undisturbed / "checkpoints"))
    rows = [read_stage(str(place)).metrics for place in (undisturbed, folder)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


@pytest.fixture(scope="module")
def slow_clip(tmp_path_factory: pytest.TempPathFactory, small: Path) -> str:
    """A tower that takes a tenth of a second for an image: time to be killed in."""
    return write_clip(tmp_path_factory.mktemp("clip"), small, width=768, num_layers=12)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kill", [kill_driver, kill_encoder, kill_session])
def test_a_killed_caching_loses_no_finished_image_and_ends_with_the_same_rows(make_settings, slow_clip, tmp_path, kill):
    settings = make_settings(cache={"rows_per_file": 1}, vision={"path": slow_clip})
    straight, killed = (write_run(tmp_path, name, settings) for name in ("straight", "killed"))
    subprocess.run(command("cache_features", straight), check=True)
    undisturbed = FeatureCache.open(str(cache_in(tmp_path / "straight")))
    started = subprocess.Popen(command("cache_features", killed))
    wait_for(started, lambda: len(ledger(tmp_path / "killed")) >= 4 and actors(started, "Encoder"))
    kill(started)
    if kill is kill_encoder:
        # Ray starts another one, and the command goes on.
        assert started.wait(timeout=300) == 0
    else:
        finished = len(ledger(tmp_path / "killed"))
        assert finished < len(undisturbed)
        again = subprocess.run(command("cache_features", killed), check=True, capture_output=True, text=True)
        assert num_encoded(again) <= len(undisturbed) - finished
    assert_same_rows(undisturbed, FeatureCache.open(str(cache_in(tmp_path / "killed"))))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("whole_session", [False, True])
def test_a_kill_while_an_int8_cache_is_calibrated_changes_nothing(make_settings, tmp_path, whole_session):
    settings = make_settings(cache={"codec": "int8"})
    straight, killed = (write_run(tmp_path, name, settings) for name in ("straight", "killed"))
    subprocess.run(command("cache_features", straight), check=True)
    started = subprocess.Popen(command("cache_features", killed))
    wait_for(started, lambda: actors(started, "_calibrate"))
    assert not (cache_in(tmp_path / "killed", "int8") / "calibration.json").exists()
    if whole_session:
        kill_session(started)
        assert ledger(tmp_path / "killed") == []
        subprocess.run(command("cache_features", killed), check=True)
    else:
        for worker in actors(started, "_calibrate"):
            os.kill(worker, signal.SIGKILL)
        assert started.wait(timeout=300) == 0
    one, other = (cache_in(tmp_path / name, "int8") for name in ("straight", "killed"))
    assert (one / "calibration.json").read_bytes() == (other / "calibration.json").read_bytes()
    assert_same_rows(FeatureCache.open(str(one)), FeatureCache.open(str(other)))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_jobs_that_extend_one_cache_at_the_same_time_leave_every_image_once(
    make_settings, slow_clip, small, tmp_path
):
    records = json.loads((small / "data/pretrain.json").read_text())
    third = len(records) // 3
    runs = []
    for name, part in {"one": records[: 2 * third], "other": records[third:]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
        data = {"pretrain": str(tmp_path / f"{name}.json"), "finetune": None, "evaluate": {}}
        settings = make_settings(
            data=data,
            vision={"path": slow_clip},
            cache={"uri": str(tmp_path / "cache"), "rows_per_file": 1, "commit_every_s": 0.5},
        )
        runs.append(write_run(tmp_path, name, settings))
    started = [subprocess.Popen(command("cache_features", run)) for run in runs]
    assert [one.wait(timeout=500) for one in started] == [0, 0]
    (folder,) = (tmp_path / "cache").glob("*/float16")
    cache = FeatureCache.open(str(folder))
    wanted = {
        hashlib.sha256((small / "data/images" / image).read_bytes()).hexdigest()
        for record in records
        for image in ([record["image"]] if isinstance(record["image"], str) else record["image"])
    }
    assert cache.keys() == sorted(wanted)
    assert cache.verify() == []
    rows_written = sum(pq.read_metadata(file).num_rows for file in folder.glob("data/*.parquet"))
    assert rows_written == len(cache) + cache.manifest.num_shadowed
