"""Checkpoints written beside the training: a copy of their step, complete or invisible, with failures told."""

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from meteor.checkpoint.folder import complete_checkpoints, problems_of_damaged
from meteor.checkpoint.format import Checkpoint, Fragment, checkpoint_uri, write_fragments
from meteor.errors import StorageError
from meteor.train import checkpoints
from meteor.train.checkpoints import CheckpointWriter, newest_sound_checkpoint

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


def test_nothing_is_completed_or_removed_without_ownership(tmp_path):
    owned = CheckpointWriter(OneTensor(), str(tmp_path), keep=1)
    owned.save(1, {})
    owned.finish()
    owned.close()
    superseded = CheckpointWriter(OneTensor(), str(tmp_path), keep=1, is_owner=lambda: False)
    superseded.save(2, {})
    superseded.finish()
    superseded.close()
    assert complete_checkpoints(str(tmp_path)) == [checkpoint_uri(str(tmp_path), 1)]


def test_parts_that_a_new_owner_removed_are_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_OWNER_POLL_S", 0.0)
    first, second = make_pair(str(tmp_path), monkeypatch)
    first._is_owner = lambda: False
    first.save(1, {})
    first.wait()  # the second worker's part never comes
    assert complete_checkpoints(str(tmp_path)) == []
    first.close()
    second.close()


def write_checkpoints(root, *steps):
    writer = CheckpointWriter(OneTensor(), root, keep=9)
    for step in steps:
        writer.save(step, {})
    writer.finish()
    writer.close()
    return complete_checkpoints(root)


def flip_a_bit(data):
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


@pytest.mark.parametrize("file", ["manifest.json", "*/rank_*.safetensors"])
@pytest.mark.parametrize("spoil", [flip_a_bit, lambda data: data[:-10], lambda data: bytes(len(data)), None])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, file, spoil):
    first, second = write_checkpoints(str(tmp_path), 1, 2)
    [damaged] = Path(second).glob(file)
    if spoil is None and file == "manifest.json":
        pytest.skip("without a manifest the checkpoint is incomplete, which is no damage")
    if spoil is None:
        damaged.unlink()
    else:
        damaged.write_bytes(spoil(damaged.read_bytes()))

    found = newest_sound_checkpoint(str(tmp_path))

    assert found.uri == first
    assert complete_checkpoints(str(tmp_path)) == [first]
    assert any(
        "damaged" in text or "not exist" in text or "ends" in text
        for text in problems_of_damaged(str(tmp_path)).values()
    )


def test_a_sound_checkpoint_is_the_newest(tmp_path):
    *_, newest = write_checkpoints(str(tmp_path), 1, 2)
    assert newest_sound_checkpoint(str(tmp_path)).uri == newest


def test_without_a_sound_checkpoint_there_is_none(tmp_path):
    assert newest_sound_checkpoint(str(tmp_path)) is None
    [only] = write_checkpoints(str(tmp_path), 1)
    (Path(only) / "manifest.json").write_text("[]")
    assert newest_sound_checkpoint(str(tmp_path)) is None


def agree_on_the_newest(root, found):
    checkpoint = newest_sound_checkpoint(root)
    Path(found, f"{dist.get_rank()}.txt").write_text(checkpoint.uri)


def test_all_workers_pass_over_what_one_of_them_found_damaged(tmp_path, start_workers):
    root = str(tmp_path / "checkpoints")
    first, second = write_checkpoints(root, 1, 2)
    # The second worker reads the second fragment and the first worker does not.
    [file] = Path(second).glob("*/rank_*.safetensors")
    data = file.read_bytes()
    start = len(data) - 3 * 16 + 16
    file.write_bytes(data[:start] + b"\xff" + data[start + 1 :])
    start_workers(2, agree_on_the_newest, root, str(tmp_path))
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [first, first]
