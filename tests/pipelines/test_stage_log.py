"""A tracking server that is away at the start, in the middle and at the end of a stage."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from mlflow import MlflowClient
from ray import cloudpickle

from meteor import stopping, storage
from meteor.checkpoint.format import checkpoint_uri
from meteor.config import RunSettings
from meteor.errors import TrackingError
from meteor.runs import mlflow_log as stage_log
from meteor.runs.folder import StageFolder, Summary
from meteor.runs.identity import StageIdentity
from meteor.runs.metrics import MetricsSegment
from meteor.stopping import Stopped
from meteor.tracking import Tracker
from pipelines.ray_parts.log_to_mlflow import LogToMlflow
from pipelines.ray_parts.tracked import reuse, tracked

# MLflow's own way with SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory):
    """MLflow takes seconds to bring a new database to its present form."""
    file = tmp_path_factory.mktemp("mlflow") / "template.db"
    Tracker(f"sqlite:///{file}", "template")
    return file


@pytest.fixture
def database(migrated_database, tmp_path):
    return str(shutil.copy(migrated_database, tmp_path / "mlflow.db"))


class Run:
    """A stage of a run."""

    def __init__(self, settings, stage, content):
        self.settings, self.folder = settings, StageFolder(settings.output, StageIdentity(stage, content))
        self.folder.start(settings)
        self.uri, self.finish, self.finished = self.folder.uri, self.folder.finish, self.folder.finished

    def tracked(self, params):
        return tracked(self.settings, self.folder, params)

    def reuse(self, summary):
        return reuse(self.settings, self.folder, summary)


@pytest.fixture
def make_run(tmp_path):
    """A stage of a run, as it is again at each start of its command."""

    def make(tracking_uri):
        settings = RunSettings.model_validate(
            {"name": "r", "output": str(tmp_path / "out"), "tracking": {"uri": tracking_uri, "experiment": "e"}}
        )
        return Run(settings, "pretrain", {})

    return make


@pytest.fixture
def away(monkeypatch):
    """A switch: while on, there is no server."""
    state = {"on": True}

    def connect(settings):
        if state["on"]:
            raise TrackingError("MLflow cannot be reached")
        return Tracker(stage_log.tracking_uri(settings), settings.tracking.experiment)

    monkeypatch.setattr(stage_log, "make_tracker", connect)
    return state


def make_rows(*steps):
    return [{"step": step, "loss": 1 / step, "lr": 0.1, "time_ms": 1000 + step} for step in steps]


def runs_of(uri):
    """Stage -> MLflow's run; the pipeline's under ""."""
    client = MlflowClient(tracking_uri=uri)
    found = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    return {run.data.tags.get("meteor.stage", ""): run for run in found}


def statuses(uri):
    return {stage: run.info.status for stage, run in runs_of(uri).items()}


def points(uri, run, key):
    history = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, key)
    return sorted((metric.step, metric.value) for metric in history)


def test_a_stage_without_a_server_finishes_and_is_logged_when_it_is_found_finished(make_run, database, away, caplog):
    uri = f"sqlite:///{database}"
    run = make_run(uri)
    with run.tracked({"pretrain": {"lr": 0.1}}) as log:
        log.dataset(name="cache", digest="k", source="/cache", context="training")
        segment = MetricsSegment(run.uri, attempt=0)
        segment.add(make_rows(1, 2))
        log.live(make_rows(1, 2))
        storage.write_json(storage.join(run.uri, "scores.json"), {})
        log.metrics({"exact_match": 0.5}, pipeline=True)
        log.file("scores.json")
        log.tag("meteor.result", "/result")
    run.finish(Summary("pretrain", {}, 1.0, {}, extra={"metrics": segment.listed()}))
    assert [record.message.partition(". ")[2][:9] for record in caplog.records] == ["The stage", "The MLflo"]

    again = make_run(uri)
    found = again.finished()
    assert again.reuse(found) is found  # still away
    away["on"] = False
    for _ in range(2):
        again.reuse(found)
    runs = runs_of(uri)
    stage, pipeline = runs["pretrain"], runs[""]
    assert (stage.info.status, pipeline.info.status) == ("FINISHED", "FINISHED")
    assert stage.data.params == pipeline.data.params == {"pretrain.lr": "0.1"}
    assert stage.data.tags["mlflow.parentRunId"] == pipeline.info.run_id
    assert stage.data.tags["meteor.result"] == "/result"
    assert [one.dataset.name for one in stage.inputs.dataset_inputs] == ["cache"]
    assert points(uri, stage, "loss") == [(1, 1.0), (2, 0.5)]
    for one in (stage, pipeline):
        assert points(uri, one, "exact_match") == [(0, 0.5)]
    artifacts = MlflowClient(tracking_uri=uri).list_artifacts(stage.info.run_id)
    assert [one.path for one in artifacts] == ["scores.json"]


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"damaged" * 1000), lambda file: file.mkdir()])
def test_a_stage_whose_database_cannot_be_used_finishes_and_is_sent_when_the_file_has_been_moved_away(
    make_run, tmp_path, damage, caplog
):
    file = tmp_path / "mlflow.db"
    damage(file)
    run = make_run(f"sqlite:///{file}")
    with run.tracked({"lr": 0.1}) as log:
        segment = MetricsSegment(run.uri, attempt=0)
        segment.add(make_rows(1, 2))
        log.live(make_rows(1, 2))
    run.finish(Summary("pretrain", {}, 1.0, {}, extra={"metrics": segment.listed()}))
    assert "move it away" in caplog.text
    file.rename(tmp_path / "moved")
    again = make_run(f"sqlite:///{file}")
    again.reuse(again.finished())
    stage = runs_of(f"sqlite:///{file}")["pretrain"]
    assert (stage.info.status, stage.data.params) == ("FINISHED", {"lr": "0.1"})
    assert points(f"sqlite:///{file}", stage, "loss") == [(1, 1.0), (2, 0.5)]


def test_a_server_that_comes_in_the_middle_gets_what_it_missed_and_goes_on(make_run, database, away, monkeypatch):
    uri, clock = f"sqlite:///{database}", {"now": 0.0}
    monkeypatch.setattr(stage_log.time, "monotonic", lambda: clock["now"])
    run = make_run(uri)
    with run.tracked({}) as log:
        segment = MetricsSegment(run.uri, attempt=0)

        def report(step):
            segment.add(make_rows(step))
            log.live(make_rows(step))

        report(1)
        away["on"] = False
        report(2)  # within a minute of the last try
        with pytest.raises(AttributeError):
            runs_of(uri)
        clock["now"] += 61
        report(3)
        assert points(uri, runs_of(uri)["pretrain"], "loss") == [(step, 1 / step) for step in (1, 2, 3)]
        assert runs_of(uri)["pretrain"].info.status == "RUNNING"
        report(4)
        assert len(points(uri, runs_of(uri)["pretrain"], "loss")) == 4
    assert points(uri, runs_of(uri)["pretrain"], "loss") == [(step, 1 / step) for step in (1, 2, 3, 4)]
    assert stage_log.StageLog.unsent(run.settings, run.folder) is None


def test_the_callback_in_ray_s_controller_logs_to_the_same_run(make_run, database):
    uri = f"sqlite:///{database}"
    with make_run(uri).tracked({}) as log:
        there = cloudpickle.loads(cloudpickle.dumps(LogToMlflow(log)))
        there._log.live(make_rows(1, 2))
        assert points(uri, runs_of(uri)["pretrain"], "loss") == [(1, 1.0), (2, 0.5)]


def test_a_stage_that_fails_is_a_failed_run(make_run, database):
    uri = f"sqlite:///{database}"
    with pytest.raises(ValueError, match="broken"), make_run(uri).tracked({}):
        raise ValueError("broken")
    assert statuses(uri) == {"pretrain": "FAILED", "": "FAILED"}
    with make_run(uri).tracked({}):
        assert statuses(uri) == {"pretrain": "RUNNING", "": "RUNNING"}
    assert statuses(uri) == {"pretrain": "FINISHED", "": "FINISHED"}


@pytest.mark.parametrize(("steps", "where"), [((), "its first step"), ((5, 20), "step 20")])
def test_a_stage_that_is_stopped_is_a_killed_run_and_names_the_step_from_which_it_goes_on(
    make_run, database, steps, where
):
    uri, run = f"sqlite:///{database}", make_run(f"sqlite:///{database}")
    for step in steps:
        storage.write_json(
            storage.join(checkpoint_uri(storage.join(run.uri, "checkpoints"), step), "manifest.json"), {}
        )
    with pytest.raises(Stopped) as stopped, run.tracked({}):
        raise KeyboardInterrupt
    assert str(stopped.value) == f"[r] pretrain: stopped; the same command goes on from {where}"
    assert statuses(uri) == {"pretrain": "KILLED", "": "KILLED"}


def test_an_error_in_a_thread_of_a_command_that_was_stopped_is_a_stop(make_run, database, monkeypatch):
    run = make_run(f"sqlite:///{database}")

    def lose_ray():
        monkeypatch.setattr(stopping._Request, "received", signal.SIGTERM)
        raise ValueError("Ray has ended")

    with pytest.raises(Stopped), run.tracked({}):
        lose_ray()
    assert statuses(f"sqlite:///{database}")["pretrain"] == "KILLED"
    with pytest.raises(Stopped), make_run(f"sqlite:///{database}").tracked({}):
        raise AssertionError("it must not start")


class Server:
    """``mlflow server`` on loopback, to be stopped and started again."""

    def __init__(self, database):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._database, self.uri = database, f"http://127.0.0.1:{self._port}"
        self._process = None

    def start(self):
        options = ["--backend-store-uri", f"sqlite:///{self._database}", "--host", "127.0.0.1", "--workers", "1"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options, "--port", str(self._port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self._process.poll() is None
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError("the server did not start")

    def kill(self):
        """All of it at one moment: its workers are processes of their own."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(database):
    server = Server(database)
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_server_that_dies_while_a_stage_logs_has_every_number_once_in_the_end(
    make_run, server, database, monkeypatch, caplog
):
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("meteor.tracking.client._OUTAGE_PAUSE_S", 0.0)
    monkeypatch.setattr(stage_log, "_RETRY_S", 0.0)
    monkeypatch.setattr("meteor.tracking.client._MAX_METRICS", 3)  # calls end in the middle of rows
    steps = iter(range(1, 1000))
    run = make_run(server.uri)
    with run.tracked({"lr": 0.1}) as log:  # away at the start
        segment = MetricsSegment(run.uri, attempt=0)

        def report(num_steps):
            for _ in range(num_steps):
                rows = make_rows(*(next(steps) for _ in range(5)))
                segment.add(rows)
                log.live(rows)

        report(2)
        server.start()
        report(10)
        # While rows are on their way.
        killer = threading.Timer(0.2, server.kill)
        killer.start()
        report(60)
        killer.join()
        report(2)
        server.start()
        report(3)
        server.kill()
    run.finish(Summary("pretrain", {}, 1.0, {}, extra={"metrics": segment.listed()}))  # away at the end
    assert "run the same command again" in caplog.text
    last = next(steps) - 1
    server.start()
    again = make_run(server.uri)
    again.reuse(again.finished())
    stage = runs_of(server.uri)["pretrain"]
    assert stage.info.status == "FINISHED"
    assert points(server.uri, stage, "loss") == [(step, 1 / step) for step in range(1, last + 1)]
    assert points(server.uri, stage, "lr") == [(step, 0.1) for step in range(1, last + 1)]


def test_a_variants_stage_is_below_the_variant_and_a_shared_one_below_the_study(database, tmp_path):
    def track(name, stage, digest, used_by=()):
        tracking = {"uri": f"sqlite:///{database}", "experiment": "e", "study": "s", "used_by": list(used_by)}
        content = {"name": name, "output": str(tmp_path / "out"), "tracking": tracking}
        with Run(RunSettings.model_validate(content), stage, {"samples": digest}).tracked({"projector": {"k": 8}}):
            pass

    track("shared-1", "pretrain", "a", used_by=("one", "two"))
    track("one", "finetune", "b")
    track("two", "finetune", "c")
    client = MlflowClient(f"sqlite:///{database}")
    [experiment] = client.search_experiments(filter_string="name = 'e'")
    runs = client.search_runs([experiment.experiment_id])
    names = {run.info.run_id: run.info.run_name for run in runs}
    parents = {run.info.run_name: names.get(run.data.tags.get("mlflow.parentRunId")) for run in runs}
    assert parents == {
        "s": None,
        "pretrain of one, two": "s",
        "one": "s",
        "two": "s",
        "one finetune": "one",
        "two finetune": "two",
    }
    by_name = {run.info.run_name: run for run in runs}
    assert by_name["pretrain of one, two"].data.tags["used_by"] == "one, two"
    # The variant has its stage's parameters beside it, the study none of a single stage.
    assert (by_name["one"].data.params, by_name["s"].data.params) == ({"projector.k": "8"}, {})
    assert {name: by_name[name].info.status for name in ("one", "s")} == {"one": "FINISHED", "s": "RUNNING"}
