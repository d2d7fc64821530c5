"""Databases that MLflow cannot use, and drivers that are not there: one error of one line with its cure, in no time."""

import os
import random
import shutil
import sqlite3
import subprocess
from contextlib import closing

import alembic.command
import pytest
from alembic.script import ScriptDirectory
from mlflow.store.db.utils import _get_alembic_config, create_sqlalchemy_engine
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase

from meteor.errors import TrackingError
from meteor.tracking import Tracker, database

# MLflow's own way with SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
MOVE_AWAY = "move it away"


@pytest.fixture
def file(migrated_database, tmp_path):
    return shutil.copy(migrated_database, tmp_path / "mlflow.db")


def execute(file, statement):
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(statement)
        connection.commit()


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    content, rng = bytearray(file.read_bytes()), random.Random(0)
    for _ in range(2000):
        content[rng.randrange(len(content))] ^= 0xFF
    file.write_bytes(content)


def make_folder(file):
    file.unlink()
    file.mkdir()


def make_other(file):
    file.unlink()
    execute(file, "CREATE TABLE books (title TEXT)")


def make_newer(file):
    execute(file, "UPDATE alembic_version SET version_num = 'ffffffffffff'")


UNUSABLE = {
    "random bytes": (lambda file: file.write_bytes(random.Random(0).randbytes(100_000)), MOVE_AWAY),
    "truncated": (truncate, MOVE_AWAY),
    "flipped": (flip, MOVE_AWAY),
    "a folder": (make_folder, MOVE_AWAY),
    "of another program": (make_other, "name another file in tracking.uri"),
    "of a newer MLflow": (make_newer, "install that version"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_file_that_is_no_database_of_this_mlflow_is_left_alone_and_the_error_says_what_to_do(file, kind):
    change, cure = UNUSABLE[kind]
    change(file)
    content = None if file.is_dir() else file.read_bytes()
    with pytest.raises(TrackingError, match=cure) as caught:
        Tracker(f"sqlite:///{file}", "e").run("r", "r")
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert content is None or file.read_bytes() == content


def test_a_locked_database_is_given_up(file, monkeypatch):
    monkeypatch.setattr(database, "_BUSY_S", 0.1)
    with closing(sqlite3.connect(file)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TrackingError, match="another process holds the database"):
            Tracker(f"sqlite:///{file}", "e")
    assert Tracker(f"sqlite:///{file}", "e").run("r", "r")


def test_a_start_that_does_not_end_is_not_waited_for_for_ever(file, monkeypatch):
    monkeypatch.setattr(database, "_LOCK_WAIT_S", 0.2)
    with database._locked(file), pytest.raises(TrackingError, match="another process has prepared the MLflow database"):
        Tracker(f"sqlite:///{file}", "e")


@pytest.mark.parametrize(
    ("uri", "cure"),
    [
        ("postgresql+pg8000://user:hunter2@127.0.0.1:1/x", "install the driver"),
        ("postgresql+nonsense://user:hunter2@127.0.0.1:1/x", "the driver's name is unknown"),
        ("postgresql+psycopg2://user:hunter2@127.0.0.1:1/x", "Connection refused"),
        ("nonsense://user:hunter2@x", "tracking.uri starts with"),
        ("sqlite:/mlflow.db", "tracking.uri starts with"),
    ],
)
def test_a_driver_or_server_that_is_not_there_is_an_outage_without_the_password(uri, cure):
    with pytest.raises(TrackingError, match=cure) as caught:
        Tracker(uri, "e")
    assert "hunter2" not in str(caught.value)


def migrate_almost(file):
    """Run all of MLflow's migrations but the last."""
    engine = create_sqlalchemy_engine(f"sqlite:///{file}")
    InitialBase.metadata.create_all(engine)
    config = _get_alembic_config(f"sqlite:///{file}")
    scripts = ScriptDirectory.from_config(config)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, scripts.get_revision(scripts.get_current_head()).down_revision)
    engine.dispose()


def test_a_database_of_an_older_mlflow_is_migrated_and_the_old_file_is_kept(tmp_path, caplog):
    file = tmp_path / "mlflow.db"
    migrate_almost(file)
    execute(file, "INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (7, 'e', 'active')")
    old = file.read_bytes()
    assert Tracker(f"sqlite:///{file}", "e").experiment_id == "7"
    (kept,) = tmp_path.glob("mlflow.db.*.bak")
    assert kept.read_bytes() == old
    assert "was of an older MLflow and is migrated" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("lose", ["DROP TABLE metrics", "DROP TABLE experiments", "DELETE FROM alembic_version"])
def test_a_database_that_was_never_completed_is_made_anew_and_the_old_file_is_kept(tmp_path, caplog, lose):
    file = tmp_path / "mlflow.db"
    migrate_almost(file)
    execute(file, lose)
    assert Tracker(f"sqlite:///{file}", "e").run("r", "r")
    assert len(list(tmp_path.glob("mlflow.db.*.bak"))) == 1
    assert "had never been completed and is made anew" in caplog.text


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=False).returncode:
        pytest.skip("only root may mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_an_outage_and_keeps_no_part_of_a_database(small_disk):
    with pytest.raises(TrackingError, match="free space on the disk"):
        Tracker(f"sqlite:///{small_disk}/mlflow.db", "e")
    assert os.listdir(small_disk) == ["mlflow.db.lock"]


def test_a_disk_that_cannot_be_written_is_an_outage(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(TrackingError, match="its folder must be writable"):
        Tracker(f"sqlite:///{small_disk}/mlflow.db", "e")
