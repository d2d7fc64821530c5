"""Kill a running stage with SIGKILL, start it again with the same command: the same result as without the kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from meteor.cache import FeatureCache
from meteor.checkpoint.format import KINDS, Checkpoint, complete_checkpoints
from meteor.report import read_stage_run


def command(stage: str, run_file: Path) -> list[str]:
    return [sys.executable, "-m", f"pipelines.{stage}", "--run", str(run_file)]


def write_run(folder: Path, name: str, settings) -> Path:
    content = settings.model_dump(mode="json")
    content["output"] = str(folder / name)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def kill_when(started: subprocess.Popen, ready) -> None:
    """SIGKILL to the driver as soon as ``ready()``; Ray's processes of a local session die with their driver."""
    deadline = time.monotonic() + 240
    while not ready():
        assert started.poll() is None, "the stage ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(make_settings, tmp_path, zero_stage):
    stage = {"epochs": 12, "checkpoint_every_steps": 2, "zero_stage": zero_stage}
    settings = make_settings(pretrain=stage, cache={"uri": str(tmp_path / "cache"), "rows_per_file": 8})
    straight, killed = (write_run(tmp_path, name, settings) for name in ("straight", "killed"))
    subprocess.run(command("cache_features", straight), check=True)
    subprocess.run(command("pretrain", straight), check=True)
    (undisturbed,) = (tmp_path / "straight").glob("runs/pretrain-*/checkpoints")
    root = str(tmp_path / "killed" / undisturbed.relative_to(tmp_path / "straight"))
    kill_when(subprocess.Popen(command("pretrain", killed)), lambda: len(complete_checkpoints(root)) >= 2)
    interrupted_at = Checkpoint(complete_checkpoints(root)[-1]).state["step"]
    subprocess.run(command("pretrain", killed), check=True)
    one = Checkpoint(complete_checkpoints(str(undisturbed))[-1])
    other = Checkpoint(complete_checkpoints(root)[-1])
    assert interrupted_at < one.state["step"] == other.state["step"]
    for name in one.shapes:
        for kind in KINDS:
            assert torch.equal(one.read(kind, name), other.read(kind, name)), f"{kind} of {name}"
    rows = [read_stage_run(str(Path(folder).parent)).metrics for folder in (undisturbed, root)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_caching_loses_no_finished_picture_and_ends_with_the_same_rows(make_settings, tmp_path):
    settings = make_settings(cache={"rows_per_file": 1}, runtime={"encoder_batch_size": 1})
    straight, killed = (write_run(tmp_path, name, settings) for name in ("straight", "killed"))
    subprocess.run(command("cache_features", straight), check=True)

    def ledger() -> list[Path]:
        return list((tmp_path / "killed/cache").glob("*/float16/ledger/features-*"))

    kill_when(subprocess.Popen(command("cache_features", killed)), lambda: len(ledger()) >= 4)
    finished = len(ledger())
    again = subprocess.run(command("cache_features", killed), check=True, capture_output=True, text=True)
    (one,), (other,) = (list((tmp_path / name / "cache").glob("*/float16")) for name in ("straight", "killed"))
    first, second = FeatureCache.open(str(one)), FeatureCache.open(str(other))
    assert first.keys() == second.keys()
    assert second.verify() == []
    encoded = int(next(line for line in again.stdout.splitlines() if "pictures encoded" in line).split()[-1])
    assert encoded <= len(second) - finished
    for key in first.keys():  # noqa: SIM118  (a cache is no mapping)
        for a, b in zip(first.get(key).features, second.get(key).features, strict=True):
            assert torch.equal(a, b)
