"""Checkpoints written beside the training: a copy of their step, complete or invisible, with failures told."""

import threading

import pytest
import torch

from meteor.checkpoint.folder import complete_checkpoints
from meteor.checkpoint.format import Checkpoint, Fragment, checkpoint_uri, write_fragments
from meteor.errors import StorageError
from meteor.train import checkpoints
from meteor.train.checkpoints import CheckpointWriter

KINDS = ("weights", "exp_avg", "exp_avg_sq")


class OneTensor:
    """An engine of one parameter of four elements, of which each of ``world_size`` ranks has its part."""

    device = torch.device("cpu")

    def __init__(self, rank=0, world_size=1):
        self.rank, self.world_size = rank, world_size
        self.values = torch.zeros(4 // world_size)

    def fragments(self):
        for kind in KINDS:
            values = self.values if kind == "weights" else self.values.clone()
            yield Fragment(kind, "a", self.rank * len(self.values), values)

    def shapes(self):
        return {"a": [4]}


@pytest.fixture
def held_back(monkeypatch):
    """Uploads wait for the event."""
    event = threading.Event()

    def write(*arguments, **options):
        assert event.wait(20)
        write_fragments(*arguments, **options)

    monkeypatch.setattr(checkpoints, "write_fragments", write)
    return event


def test_training_goes_on_while_a_checkpoint_of_its_step_is_uploaded(tmp_path, held_back):
    engine = OneTensor()
    writer = CheckpointWriter(engine, str(tmp_path), keep=2)
    writer.save(1, {"epoch": 0})
    engine.values += 7  # the next step
    assert complete_checkpoints(str(tmp_path)) == []
    held_back.set()
    writer.finish()
    [uri] = complete_checkpoints(str(tmp_path))
    assert Checkpoint(uri).read("weights", "a").tolist() == [0.0] * 4
    assert Checkpoint(uri).state == {"step": 1, "epoch": 0}
    writer.close()


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path, held_back):
    writer = CheckpointWriter(OneTensor(), str(tmp_path), keep=2)
    writer.save(1, {})
    threading.Timer(0.2, held_back.set).start()
    writer.save(2, {})
    assert complete_checkpoints(str(tmp_path)) == [checkpoint_uri(str(tmp_path), 1)]
    writer.finish()
    assert len(complete_checkpoints(str(tmp_path))) == 2
    writer.close()


def test_a_failed_upload_is_raised_by_the_next_checkpoint(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise StorageError("the bucket is gone")

    monkeypatch.setattr(checkpoints, "write_fragments", refuse)
    writer = CheckpointWriter(OneTensor(), str(tmp_path), keep=2)
    writer.save(1, {})
    with pytest.raises(StorageError, match="the bucket is gone"):
        writer.save(2, {})
    writer.close()


def make_pair(root, monkeypatch):
    monkeypatch.setattr(checkpoints, "on_first_worker", lambda function: "attempt")
    return [CheckpointWriter(OneTensor(rank, 2), root, keep=2) for rank in (0, 1)]


def test_a_checkpoint_exists_when_the_last_worker_has_written(tmp_path, monkeypatch):
    first, second = make_pair(str(tmp_path), monkeypatch)
    first.save(1, {})
    assert not first._pending.done()
    assert complete_checkpoints(str(tmp_path)) == []
    second.save(1, {})
    first.wait()
    [uri] = complete_checkpoints(str(tmp_path))
    assert Checkpoint(uri).read("weights", "a").tolist() == [0.0] * 4
    first.close()
    second.close()


def test_a_worker_that_is_gone_is_not_waited_for_after_a_failure(tmp_path, monkeypatch):
    first, second = make_pair(str(tmp_path), monkeypatch)
    first.save(1, {})
    first.close()
    assert complete_checkpoints(str(tmp_path)) == []
    second.close()


def test_what_another_attempt_wrote_of_the_step_counts_for_nothing(tmp_path, monkeypatch):
    first, second = make_pair(str(tmp_path), monkeypatch)
    # Killed at the same step: one worker had written, one had not.
    write_fragments(checkpoint_uri(str(tmp_path), 1), 1, OneTensor(1, 2).fragments(), attempt="before")
    first.save(1, {})
    first.close()
    assert complete_checkpoints(str(tmp_path)) == []
    second.close()
