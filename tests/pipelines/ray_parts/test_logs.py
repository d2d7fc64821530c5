import json
import logging
import threading
from contextvars import copy_context

import pytest

from pipelines.ray_parts import logs
from pipelines.ray_parts.logs import JsonFormatter, configure_worker_logging, lines_are_about, log_context


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Whatever a test configures is taken back."""
    monkeypatch.setattr(logs, "_PROCESS", {})
    root, names = logging.getLogger(), (*logs._OURS, "ray.train", "ray.data")
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    root.handlers, root.level = handlers, level
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


def line(message="done", **changes):
    record = logging.LogRecord("pipelines.one", logging.INFO, "file", 1, message, (), None)
    vars(record).update(changes)
    return json.loads(JsonFormatter().format(record))


def test_a_line_says_what_it_is_about():
    with log_context(run="k64", stage="pretrain", digest="0123"):
        inside = line("step 1")
    assert (inside["message"], inside["level"], inside["logger"]) == ("step 1", "INFO", "pipelines.one")
    assert (inside["run"], inside["stage"], inside["digest"]) == ("k64", "pretrain", "0123")
    assert "stage" not in line()


def test_threads_of_variants_that_run_at_the_same_time_do_not_mix():
    found = {}

    def stage(name):
        with log_context(run=name):
            # As the progress of a stage is told.
            thread = threading.Thread(target=copy_context().run, args=(lambda: found.setdefault(name, line()),))
            thread.start()
            thread.join()

    stages = [threading.Thread(target=stage, args=(name,)) for name in "ab"]
    for thread in stages:
        thread.start()
    for thread in stages:
        thread.join()
    assert {name: one["run"] for name, one in found.items()} == {"a": "a", "b": "b"}


def test_a_worker_is_about_one_thing_in_all_its_threads(monkeypatch, capsys):
    monkeypatch.setenv("METEOR_LOG_FORMAT", "json")
    logging.getLogger().handlers = [logging.StreamHandler()]  # as Ray leaves it
    configure_worker_logging(stage="pretrain", rank=1)
    lines_are_about(step=7)
    thread = threading.Thread(target=lambda: logging.getLogger("meteor.storage").warning("slow %s", "store"))
    thread.start()
    thread.join()
    logging.getLogger("meteor.storage").info("not told by every worker")
    logging.getLogger("botocore").info("nor this")
    [told] = capsys.readouterr().err.splitlines()
    told = json.loads(told)
    assert (told["message"], told["stage"], told["rank"], told["step"]) == ("slow store", "pretrain", 1, 7)


def test_a_traceback_stays_in_its_line():
    try:
        raise ValueError("wrong")
    except ValueError as error:
        found = line(exc_info=(type(error), error, error.__traceback__))
    assert "ValueError: wrong" in found["error"]
