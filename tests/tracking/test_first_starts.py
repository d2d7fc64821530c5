"""First starts on a database that is not there yet: killed at any moment, and several at once."""

import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

# The imports take longer than the migrations, and are over when the line arrives.
START = """
import sys, mlflow.store.tracking.sqlalchemy_store
from meteor.tracking import Tracker
print("ready", flush=True)
sys.stdin.readline()
tracker = Tracker(sys.argv[1], "e")
print(tracker.experiment_id, tracker.run("r", sys.argv[2]))
"""


def start(database: Path, run: str) -> subprocess.Popen:
    """Start a process that is about to open the database."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", START, f"sqlite:///{database}", run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def runs_in(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT COUNT(*) FROM experiments WHERE name = 'e'").fetchone() == (1,)
        return connection.execute("SELECT COUNT(*) FROM runs").fetchone()[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("delay_s", [0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, 1.9, 2.2, 2.5, 3.0, 4.0])
def test_a_first_start_that_is_killed_leaves_a_database_that_the_next_start_uses(tmp_path, delay_s):
    database = tmp_path / "mlflow.db"
    killed = start(database, "killed")
    go(killed)
    time.sleep(delay_s)
    killed.kill()
    killed.communicate()
    again = start(database, "again")
    go(again)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert runs_in(database) in (1, 2)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"mlflow.db", "mlflow.db.lock"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_starts", [2, 3, 4])
def test_first_starts_at_once_share_one_database_and_one_experiment(tmp_path, num_starts):
    database = tmp_path / "mlflow.db"
    processes = [start(database, str(number)) for number in range(num_starts)]
    for process in processes:
        go(process)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * num_starts
    assert len({output.split()[0] for output in outputs}) == 1
    assert runs_in(database) == num_starts


@pytest.mark.slow
def test_a_start_that_waits_for_a_lock_whose_holder_is_killed_goes_on(tmp_path):
    database = tmp_path / "mlflow.db"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, time; f = open({f'{database}.lock'!r}, 'ab');"
         "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(600)"],
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    waiting = start(database, "waiting")
    go(waiting)
    time.sleep(0.5)
    assert os.listdir(tmp_path) == ["mlflow.db.lock"]
    holder.kill()
    holder.communicate()
    waiting.communicate(timeout=120)
    assert waiting.returncode == 0
    assert runs_in(database) == 1
