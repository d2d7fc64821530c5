"""Signals for running commands: one line, the status, MLflow's word for it, nothing left, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kills import actors, command, descendants
from mlflow import MlflowClient

from meteor.tracking import Tracker

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("signals_as_in_a_terminal")]
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
# A stage that waits for an actor for ever, in the main thread, as a training does.
WAITING = """
import sys, time, ray
from meteor.config import RunSettings
from meteor.runs.folder import StageFolder
from meteor.runs.identity import StageIdentity
from pipelines.command import guarded
from pipelines.ray_parts.runtime import ray_session
from pipelines.ray_parts.tracked import tracked

@ray.remote
class Worker:
    def work(self):
        time.sleep(600)

def act():
    content = {"name": "r", "output": sys.argv[1], "tracking": {"experiment": "e"}}
    settings = RunSettings.model_validate(content)
    folder = StageFolder(settings.output, StageIdentity("evaluate", {}))
    folder.start(settings)
    with ray_session(settings.runtime), tracked(settings, folder, {}):
        ray.get(Worker.remote().work.remote())

sys.exit(guarded(act))
"""


def wait_for(running, ready):
    deadline = time.monotonic() + 200
    while not ready():
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < deadline, "the command does not get on"
        time.sleep(0.05)


def assert_stops(running, number, line):
    """Send a signal; the command ends with its status and one last line, without a trace of Python or C++."""
    below = descendants(running.pid)
    running.send_signal(number)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == STATUS[number], errors
    assert errors.splitlines()[-1].startswith(line), errors
    assert errors.count("stopped;") == 1
    assert "Traceback" not in errors
    assert "*** SIG" not in errors
    deadline = time.monotonic() + 20
    while left := [line for pid, line in below.items() if is_running(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def runs(uri, experiment):
    client = MlflowClient(tracking_uri=uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def statuses(uri, experiment):
    return {run.info.run_name: run.info.status for run in runs(uri, experiment)}


def start(words):
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sigterm_stops_a_stage_that_waits_for_ray(tmp_path):
    Tracker(f"sqlite:///{tmp_path}/mlflow.db", "e")
    running = start([sys.executable, "-c", WAITING, str(tmp_path)])
    wait_for(running, lambda: actors(running, "Worker"))
    assert_stops(running, signal.SIGTERM, "[r] evaluate: stopped; the same command goes on from where it stopped")
    assert statuses(f"sqlite:///{tmp_path}/mlflow.db", "e") == {"r": "KILLED", "r evaluate": "KILLED"}


@pytest.fixture
def run_file(make_settings, encode, tmp_path):
    stage = {"epochs": 40, "checkpoint_every_steps": 5}
    settings = make_settings(pretrain=stage, study={"variants": {"one": {}, "two": {"finetune.lr": 1e-3}}})
    encode(settings)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return file, settings


def checkpoints(settings):
    return sorted(Path(settings.output).glob("runs/pretrain-*/checkpoints/*/manifest.json"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("phase", ["Ray starts", "workers start", "training"])
def test_a_training_that_is_stopped_says_from_which_step_it_goes_on_and_does(run_file, number, phase):
    file, settings = run_file
    running = start(command("pretrain", file))
    ready = {
        "Ray starts": lambda: any("gcs_server" in line for line in descendants(running.pid).values()),
        "workers start": lambda: actors(running, "TrainController"),
        "training": lambda: checkpoints(settings),
    }
    wait_for(running, ready[phase])
    started = phase != "Ray starts"
    assert_stops(running, number, f"[{settings.name}] pretrain: stopped" if started else "stopped; the same command")
    if started:
        ends = statuses(settings.tracking.uri, settings.tracking.experiment)
        assert ends[f"{settings.name} pretrain"] == ends[settings.name] == "KILLED"
    again = subprocess.run(command("pretrain", file), capture_output=True, text=True, check=True)
    assert "pretrain: finished in" in again.stdout
    ends = statuses(settings.tracking.uri, settings.tracking.experiment)
    assert ends[f"{settings.name} pretrain"] == ends[settings.name] == "FINISHED"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", STATUS)
def test_a_study_that_is_stopped_names_the_stages_that_are_left(run_file, number):
    file, settings = run_file
    running = start(command("ablate", file))
    wait_for(running, lambda: checkpoints(settings))
    assert_stops(
        running, number, f"[{settings.name}] stopped; the same command goes on with 5 of 5 stages: pretrain of"
    )
    ends = {}
    for run in runs(settings.tracking.uri, settings.tracking.experiment):
        ends.setdefault(run.data.tags["meteor.kind"], set()).add(run.info.status)
    # The run that encoded the images is a pipeline of its own.
    assert ends.pop("pipeline") == {"FINISHED"}
    assert ends == {"study": {"KILLED"}, "variant": {"KILLED"}, "stage": {"KILLED", "FINISHED"}}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", STATUS)
def test_the_whole_group_of_processes_may_get_the_signal(run_file, number):
    file, settings = run_file
    running = subprocess.Popen(
        command("pretrain", file), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(running, lambda: checkpoints(settings))
    os.killpg(running.pid, number)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == STATUS[number], errors
    assert errors.splitlines()[-1].startswith(f"[{settings.name}] pretrain: stopped")
