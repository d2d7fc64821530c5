"""Against a real SQLite store, migrated once and copied for each test, and against a server that is not there."""

import logging
import os
import shutil
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from meteor.errors import TrackingError
from meteor.tracking import Tracker, mlflow_name
from meteor.tracking import client as client_module

# MLflow's own way with SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def uri(migrated_database, tmp_path):
    return f"sqlite:///{shutil.copy(migrated_database, tmp_path / 'mlflow.db')}"


@pytest.fixture
def tracker(uri):
    return Tracker(uri, "experiment")


@pytest.fixture
def client(uri):
    return MlflowClient(tracking_uri=uri)


def make_rows(*steps):
    return [{"step": step, "loss": 1 / step, "lr": 0.1, "time_ms": 1000 + step} for step in steps]


def history(client, run_id, key):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def test_settings_are_logged_as_dotted_texts(tracker, client):
    run_id = tracker.run("a", "a")
    tracker.log_params(run_id, {"a": {"b": {"c": 1, "d": [2, 3]}, "e": {}}, "f": None, "g": "x" * 7000})
    logged = client.get_run(run_id).data.params
    assert logged == {"a.b.c": "1", "a.b.d": "[2, 3]", "a.e": "{}", "f": "None", "g": "x" * 6000}


ODD_NAMES = [
    "mmvet/type rec+spat", "mmvet/type rec:2b:spat", "val (zh)/exact_match", "测试/exact_match", "../exact_match", "./a",
    "a/../b", "a//b", "/a", "a/", "//", ".", "..", "...", "", "x" * 251, "x" * 252, "a:b", "a::b", "{0}", "%s", "'; --",
    "\n", "a\tb", "🙂", "a=b", "a,b",
]  # fmt: skip


def test_a_name_of_any_kind_becomes_one_that_is_accepted_and_its_own(tracker, client):
    run_id = tracker.run("a", "a")
    assert mlflow_name("scenes/exact_match") == "scenes/exact_match"
    row = {name: float(i) for i, name in enumerate(ODD_NAMES)}
    tracker.log_metrics(run_id, [{**row, "step": 0, "time_ms": 1}])
    assert tracker.backfill(run_id, [{**row, "step": 0, "time_ms": 1}]) == 0
    tracker.log_params(run_id, {name: "v" for name in ODD_NAMES if name})
    tracker.set_tags(run_id, dict.fromkeys(ODD_NAMES, "t"))
    found = client.get_run(run_id).data
    assert sorted(found.metrics.values()) == sorted(row.values())
    assert len(found.params) == len(ODD_NAMES) - 1


@given(st.sets(st.text(alphabet=st.sampled_from("a:2e./ +é"), max_size=8), min_size=2, max_size=2))
def test_different_names_stay_different(names):
    assert len({mlflow_name(name) for name in names}) == 2


def test_a_value_that_is_refused_is_named_and_loses_no_other(tracker, client, monkeypatch, caplog):
    run_id = tracker.run("a", "a")
    real = MlflowClient.log_batch

    def picky(self, run_id, **values):
        if any(value.key == "odd" for value in next(iter(values.values()))):
            raise MlflowException("not this one", error_code=INVALID_PARAMETER_VALUE)
        real(self, run_id, **values)

    monkeypatch.setattr(MlflowClient, "log_batch", picky)
    tracker.backfill(run_id, [{"step": 0, "time_ms": 1, "one": 1.0, "odd": 2.0, "two": 3.0}])
    tracker.log_params(run_id, {"one": 1, "odd": 2, "two": 3})
    found = client.get_run(run_id).data
    assert (found.metrics, found.params) == ({"one": 1.0, "two": 3.0}, {"one": "1", "two": "3"})
    assert caplog.text.count("MLflow refuses odd = ") == 2
    # All values refused: the run or the server is at fault, and nothing counts as sent.
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *a, **b: picky(*a[:2], metrics=[Metric("odd", 0.0, 0, 0)]))
    with pytest.raises(TrackingError, match="not this one"):
        tracker.backfill(run_id, [{"step": 1, "time_ms": 2, "one": 1.0, "two": 3.0}])


def test_a_password_in_the_address_is_in_no_error(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://user:hunter2@127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(TrackingError) as caught:
        Tracker(uri, "e")
    assert "hunter2" not in str(caught.value)


def test_a_stage_that_starts_again_finds_its_run_by_its_digest(tracker, client, uri):
    first = tracker.run("meteor finetune", "d" * 64, tags={"meteor.stage": "finetune"})
    tracker.finish(first, "FAILED")
    assert client.get_run(first).info.status == "FAILED"
    assert Tracker(uri, "experiment").run("another name", "d" * 64) == first
    run = client.get_run(first)
    assert (run.info.status, run.info.run_name) == ("RUNNING", "meteor finetune")
    assert run.data.tags["meteor.stage"] == "finetune"
    tracker.finish(first)
    assert client.get_run(first).info.status == "FINISHED"
    assert tracker.run("meteor finetune", "e" * 64) != first
    assert Tracker(uri, "another experiment").run("meteor finetune", "d" * 64) != first


def test_a_child_names_its_parent(tracker, client):
    parent = tracker.run("meteor", "p")
    child = tracker.run("meteor pretrain", "c", parent=parent)
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent
    assert "mlflow.parentRunId" not in client.get_run(parent).data.tags


def test_parameters_keep_their_first_value_and_new_ones_are_added(tracker, client):
    run_id = tracker.run("a", "a")
    tracker.log_params(run_id, {"train": {"lr": 0.1}})
    tracker.log_params(run_id, {"train": {"lr": 0.2, "seed": 3}})
    assert client.get_run(run_id).data.params == {"train.lr": "0.1", "train.seed": "3"}


def test_more_parameters_than_one_call_takes_are_all_logged(tracker, client):
    run_id = tracker.run("a", "a")
    tracker.log_params(run_id, {"many": {f"p{i}": i for i in range(205)}})
    assert len(client.get_run(run_id).data.params) == 205


def test_metrics_have_their_steps_and_times_and_texts_are_left_out(tracker, client):
    run_id = tracker.run("a", "a")
    tracker.log_metrics(run_id, [{**row, "name": "text"} for row in make_rows(1, 2)])
    assert history(client, run_id, "loss") == [(1, 1.0), (2, 0.5)]
    assert [metric.timestamp for metric in client.get_metric_history(run_id, "lr")] == [1001, 1002]
    assert set(client.get_run(run_id).data.metrics) == {"loss", "lr"}


def test_metrics_without_a_time_are_of_now(tracker, client):
    run_id = tracker.run("a", "a")
    tracker.log_metrics(run_id, [{"step": 0, "score": 0.5}])
    (metric,) = client.get_metric_history(run_id, "score")
    run = client.get_run(run_id)
    assert 0 <= metric.timestamp - run.info.start_time < 60_000


def test_more_metrics_than_one_call_takes_are_all_logged(tracker, client, monkeypatch):
    monkeypatch.setattr(client_module, "_MAX_METRICS", 7)
    run_id = tracker.run("a", "a")
    tracker.log_metrics(run_id, make_rows(*range(1, 11)))
    assert [step for step, _ in history(client, run_id, "loss")] == list(range(1, 11))


def test_all_runs_that_read_a_cache_are_found_by_its_digest(tracker, client):
    def log(run_id, digest):
        tracker.log_dataset(run_id, name="features", digest=digest, source="s3://bucket/cache", context="training")

    one, other, third = (tracker.run(name, name) for name in "abc")
    for run_id in (one, other, other):  # a stage that resumes logs it again
        log(run_id, "k" * 64)
    log(third, "m" * 64)
    found = client.search_runs([tracker.experiment_id], filter_string=f"dataset.digest = '{'k' * 36}'")
    assert {run.info.run_id for run in found} == {one, other}
    (given,) = client.get_run(other).inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.source) == ("features", "s3://bucket/cache")
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


def test_files_and_tags_are_kept_with_the_run(tracker, client, tmp_path):
    run_id = tracker.run("a", "a")
    tracker.log_file(run_id, "scores.json", b"{}")
    tracker.log_file(run_id, "report/page.html", b"<p>")
    tracker.set_tags(run_id, {"used_by": "b"})
    assert client.get_run(run_id).data.tags["used_by"] == "b"
    # Beside the database, not in the working directory.
    folder = tmp_path / "mlartifacts/experiment" / run_id / "artifacts"
    assert (folder / "scores.json").read_bytes() == b"{}"
    assert (folder / "report/page.html").read_bytes() == b"<p>"


@pytest.fixture
def outage(tracker, monkeypatch):
    """A switch: while on, no batch of metrics gets through. Counts the attempts."""
    log_batch, state = tracker._client.log_batch, {"on": False, "attempts": 0, "now": 0.0}

    def broken(*args, **kwargs):
        state["attempts"] += 1
        if state["on"]:
            raise MlflowException("the server is away")
        return log_batch(*args, **kwargs)

    monkeypatch.setattr(tracker._client, "log_batch", broken)
    monkeypatch.setattr(client_module.time, "monotonic", lambda: state["now"])
    return state


def test_an_outage_stops_nothing_is_told_once_and_holds_nobody_up(tracker, client, outage, caplog):
    caplog.set_level(logging.WARNING, logger="meteor.tracking")
    run_id = tracker.run("a", "a")
    tracker.log_metrics(run_id, make_rows(1))
    outage["on"] = True
    for step in (2, 3, 4):
        tracker.log_metrics(run_id, make_rows(step))
    assert outage["attempts"] == 2  # one before, one at the outage; then a minute's pause
    outage["now"] += 61
    tracker.log_metrics(run_id, make_rows(5))
    assert outage["attempts"] == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"MLflow at {tracker.uri} refused or cannot be reached: the server is away; "
        "metrics stay in the run's files and are sent later"
    ]
    outage["on"] = False
    outage["now"] += 61
    for step in (6, 7):
        tracker.log_metrics(run_id, make_rows(step))
    assert [step for step, _ in history(client, run_id, "loss")] == [1, 6, 7]
    # The next outage is told anew.
    outage["on"] = True
    tracker.log_metrics(run_id, make_rows(8))
    assert len(caplog.records) == 2


def test_what_an_outage_swallowed_is_filled_in_exactly(tracker, client, outage):
    run_id = tracker.run("a", "a")
    outage["on"] = True
    tracker.log_metrics(run_id, make_rows(2))
    outage["on"] = False
    tracker.log_metrics(run_id, make_rows(3))
    outage["now"] += 61
    tracker.log_metrics(run_id, make_rows(1, 4))
    assert tracker.backfill(run_id, make_rows(1, 2, 3, 4, 5)) == 3 * 2
    assert sorted(history(client, run_id, "loss")) == [(step, 1 / step) for step in (1, 2, 3, 4, 5)]
    assert len(history(client, run_id, "lr")) == 5
    assert tracker.backfill(run_id, make_rows(1, 2, 3, 4, 5)) == 0
    outage["on"] = True
    with pytest.raises(TrackingError, match="the server is away"):
        tracker.backfill(run_id, make_rows(6))


def test_a_row_that_was_cut_in_the_middle_is_completed(tracker, client, outage, monkeypatch):
    run_id, rows = tracker.run("a", "a"), make_rows(1, 2, 3)
    monkeypatch.setattr(client_module, "_MAX_METRICS", 3)
    send = tracker._client.log_batch

    def send_once(*args, **kwargs):
        send(*args, **kwargs)
        outage["on"] = True

    monkeypatch.setattr(tracker._client, "log_batch", send_once)
    tracker.log_metrics(run_id, rows)
    # The first call took row 1 and half of row 2.
    assert [len(history(client, run_id, key)) for key in ("loss", "lr")] == [2, 1]
    monkeypatch.setattr(tracker._client, "log_batch", send)
    outage["on"] = False
    assert tracker.backfill(run_id, rows) == 3
    assert history(client, run_id, "loss") == [(step, 1 / step) for step in (1, 2, 3)]
    assert history(client, run_id, "lr") == [(step, 0.1) for step in (1, 2, 3)]


def test_a_step_that_is_done_again_has_both_points_and_the_later_one_counts(tracker, client):
    run_id = tracker.run("a", "a")
    lost = [{"step": 3, "loss": 9.0, "time_ms": 1003}]
    again = [{"step": 3, "loss": 1.0, "time_ms": 5003}]
    tracker.log_metrics(run_id, lost)
    assert tracker.backfill(run_id, again) == 1
    assert tracker.backfill(run_id, again) == 0
    assert history(client, run_id, "loss") == [(3, 9.0), (3, 1.0)]
    assert client.get_run(run_id).data.metrics["loss"] == 1.0


def test_requests_give_up_soon_unless_the_environment_says_otherwise(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    Tracker(uri, "experiment")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"


def test_a_server_that_is_not_there_is_an_error_when_runs_are_made(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(TrackingError, match=f"MLflow at {uri} refused or cannot be reached"):
        Tracker(uri, "experiment")
