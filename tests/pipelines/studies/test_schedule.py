"""Tasks that wait for one another, in threads, without Ray."""

import threading
import time

import pytest

from pipelines.studies.schedule import run_tasks

CHAINS = {"a1": [], "a2": ["a1"], "a3": ["a2"], "b2": ["a1"], "b3": ["b2"], "c1": []}


def never():
    raise AssertionError("nothing was interrupted")


def test_every_task_runs_once_after_what_it_needs_and_a_chain_ends_before_the_next_begins():
    order = []
    outcomes = run_tasks(CHAINS, lambda task: order.append(task) or task.upper(), parallel=1, interrupt=never)
    assert order == ["a1", "a2", "a3", "b2", "b3", "c1"]
    assert {task: one.result for task, one in outcomes.items()} == {task: task.upper() for task in CHAINS}


def test_a_failure_stops_only_what_needs_it():
    def run(task):
        if task == "a2":
            raise ValueError("no luck")
        return task

    outcomes = run_tasks(CHAINS, run, parallel=2, interrupt=never)
    assert [task for task, one in outcomes.items() if one.error] == ["a2", "a3"]
    assert (outcomes["a2"].tried, outcomes["a3"].tried) == (True, False)
    assert outcomes["a3"].error is outcomes["a2"].error
    assert list(outcomes) == list(CHAINS)


def test_no_more_run_at_the_same_time_than_there_is_room_for():
    now, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(2, timeout=10)

    def run(task):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        if task in ("x0", "x1"):
            together.wait()  # two do run at the same time
        time.sleep(0.01)
        with lock:
            now -= 1

    run_tasks({f"x{i}": [] for i in range(6)}, run, parallel=2, interrupt=never)
    assert most == 2


def test_an_interrupt_is_raised_after_the_running_tasks_were_told_to_end():
    started, told, ended = threading.Event(), threading.Event(), []

    def run(task):
        if task == "a":
            assert started.wait(timeout=10)
            raise KeyboardInterrupt
        started.set()
        assert told.wait(timeout=10)
        ended.append(task)

    with pytest.raises(KeyboardInterrupt):
        run_tasks({"a": [], "b": [], "c": ["b"]}, run, parallel=2, interrupt=told.set)
    assert ended == ["b"]
