"""The folder of a stage's checkpoints: which count, which are set aside, and which go."""

import os

import pytest
from making import assert_holds, files_below, make_state, pieces, write_checkpoint

from meteor import storage
from meteor.checkpoint import folder as checkpoint_folder
from meteor.checkpoint.folder import best_checkpoint, complete_checkpoints, problems_of_damaged, prune, set_aside
from meteor.checkpoint.format import Checkpoint, checkpoint_uri, write_fragments
from meteor.errors import CheckpointError


def test_pruning_keeps_the_newest_and_removes_older_leftovers_but_none_being_written(root):
    complete = {step: write_checkpoint(root, step) for step in (10, 30, 50, 60)}
    for step in (20, 55, 70):  # crashed, crashed between two kept ones, being written now
        write_fragments(checkpoint_uri(root, step), 0, pieces(make_state(), []))
    removed = prune(root, keep=2)
    assert sorted(removed) == [checkpoint_uri(root, step) for step in (10, 20, 30, 55)]
    assert complete_checkpoints(root) == [complete[50], complete[60]]
    left = {info.uri.removeprefix(root).split("/")[1] for info in storage.list_objects(root)}
    assert left == {"step_00000050", "step_00000060", "step_00000070"}
    assert_holds(Checkpoint(complete[60]), make_state(60))


def test_the_best_on_held_out_samples_is_kept_beside_the_newest(tmp_path):
    losses = {1: 3.0, 2: 1.5, 3: 2.0, 4: 1.5, 5: 1.8}
    uris = [write_checkpoint(str(tmp_path), step, held_out_loss=loss) for step, loss in losses.items()]
    assert best_checkpoint(str(tmp_path)) == uris[1]  # the first of equals
    prune(str(tmp_path), keep=1)
    assert complete_checkpoints(str(tmp_path)) == [uris[1], uris[4]]


def test_without_held_out_samples_there_is_no_best(tmp_path):
    write_checkpoint(str(tmp_path), 1)
    assert best_checkpoint(str(tmp_path)) is None


def test_pruning_before_the_first_complete_checkpoint_removes_nothing(tmp_path):
    write_fragments(checkpoint_uri(str(tmp_path), 5), 0, pieces(make_state(), []))
    before = files_below(tmp_path)
    assert prune(str(tmp_path), keep=1) == []
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("form", ["checkpoints", "./checkpoints", "checkpoints/", "{}/checkpoints/"])
def test_pruning_takes_any_spelling_of_the_folder(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        write_checkpoint(str(tmp_path / "checkpoints"), step)
    prune(form.format(tmp_path), keep=2)
    assert sorted(name for name in os.listdir("checkpoints") if files_below(tmp_path / "checkpoints" / name)) == [
        "step_00000002",
        "step_00000003",
    ]


def test_the_manifest_goes_first_when_a_checkpoint_is_removed(tmp_path, monkeypatch):
    for step in (1, 2):
        write_checkpoint(str(tmp_path), step)
    deleted = []
    monkeypatch.setattr(checkpoint_folder.storage, "delete", deleted.append)
    prune(str(tmp_path), keep=1)
    assert deleted[0].endswith("step_00000001/manifest.json")
    assert len(deleted) == 3


def test_what_killed_attempts_left_at_the_newest_step_goes(root):
    uri = checkpoint_uri(root, 5)
    write_fragments(uri, 0, pieces(make_state(), []), attempt="killed")
    write_checkpoint(root, 5)
    prune(root, keep=1)
    names = {info.uri.removeprefix(uri).lstrip("/") for info in storage.list_objects(uri)}
    assert names == {"manifest.json", "0/rank_00000.json", "0/rank_00000_000.safetensors"}
    assert_holds(Checkpoint(uri), make_state(5))


def test_partial_files_and_empty_folders_of_removed_steps_go(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(str(tmp_path), step)
        # A write that was broken off, up to 1 GiB.
        (tmp_path / f"step_{step:08d}" / "0" / ".partial-ab").write_bytes(b"x" * 100)
    (tmp_path / "step_00000009").mkdir()
    prune(str(tmp_path), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000002", "step_00000003", "step_00000009"]
    left = [path.parent.parent.name for path in tmp_path.rglob(".partial-*")]
    assert left == ["step_00000002"]  # the step before the newest is read, not written


def test_a_checkpoint_that_was_set_aside_counts_no_more_and_is_recorded(root):
    uris = [write_checkpoint(root, step, held_out_loss=float(step)) for step in (1, 2, 3)]
    set_aside(uris[2], "a bit was flipped")
    assert complete_checkpoints(root) == uris[:2]
    assert list(problems_of_damaged(root).values()) == ["a bit was flipped"]
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        Checkpoint(uris[2])
    # Its files stay until a newer checkpoint is complete, and its record stays.
    prune(root, keep=1)
    assert any(info.uri.startswith(uris[2]) for info in storage.list_objects(root))
    write_checkpoint(root, 4)
    assert uris[2] in prune(root, keep=1)
    assert list(problems_of_damaged(root).values()) == ["a bit was flipped"]


def test_a_damaged_manifest_stops_neither_pruning_nor_the_choice_of_the_best(tmp_path):
    uris = [write_checkpoint(str(tmp_path), step, held_out_loss=float(step)) for step in (1, 2, 3)]
    storage.write_bytes(storage.join(uris[0], "manifest.json"), b"{")
    assert best_checkpoint(str(tmp_path)) == uris[1]
    assert prune(str(tmp_path), keep=1) == [uris[0]]
