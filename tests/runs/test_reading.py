"""A stage's run read back from its folder, and what a panel refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from meteor import storage
from meteor.checkpoint.format import KINDS, Fragment, checkpoint_uri, publish, write_fragments
from meteor.checksums import write_checked_json, write_checksums
from meteor.errors import DamagedError, DataError, NotFoundError
from meteor.image.slicing import plan_slices
from meteor.report import SelectionPanel, SubImageScores
from meteor.runs.metrics import MetricsSegment
from meteor.runs.reading import read_stage


@pytest.fixture
def uri(tmp_path):
    """Folder of a stage that has started."""
    uri = str(tmp_path / "runs" / "pretrain-abc")
    run = {"stage": "pretrain", "name": "demo", "digest": "abc", "settings": {"lr": 1}, "parent": None}
    write_checked_json(storage.join(uri, "run.json"), run)
    return uri


def make_rows(steps, loss=1.0):
    return [{"step": step, "loss": loss} for step in steps]


def write_checkpoint(uri, step, segments):
    """A complete checkpoint that lists segments of metrics."""
    place = checkpoint_uri(storage.join(uri, "checkpoints"), step)
    write_fragments(place, 0, [Fragment(kind, "a", 0, torch.zeros(1)) for kind in KINDS])
    publish(place, world_size=1, shapes={"a": [1]}, state={"step": step, "metrics": segments})


def finish(uri, segments):
    write_checksums(uri, leave_out=lambda name: name.startswith(("metrics/", "checkpoints/")))
    write_checked_json(storage.join(uri, "summary.json"), {"seconds": 5, "extra": {"metrics": segments}})


def read_losses(uri):
    return [(row["step"], row["loss"]) for row in read_stage(uri).metrics]


def test_a_finished_run_is_read_whole(uri):
    segment = MetricsSegment(uri, attempt=1)
    segment.add(make_rows([1, 2]))
    finish(uri, segment.listed())

    run = read_stage(uri)

    assert (run.stage, run.settings, run.finished) == ("pretrain", {"lr": 1}, True)
    assert run.metrics == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]
    assert run.recorded == {"name": "demo", "digest": "abc", "parent": None}


def test_a_run_without_summary_is_not_finished(uri):
    run = read_stage(uri)
    assert (run.finished, run.summary, run.metrics) == (False, None, [])


def make_crashed_run(uri):
    """Three starts: the first reached step 14, the second resumed at 10 and reached 25, the third resumed at 20."""
    segments = []
    for attempt, (start, checkpoint, end) in enumerate([(0, 10, 14), (10, 20, 25), (20, 30, 30)], start=1):
        segment = MetricsSegment(uri, attempt=attempt, start_step=start, before=segments)
        segment.add(make_rows(range(start + 1, checkpoint + 1), float(attempt)))
        segments = segment.listed()
        write_checkpoint(uri, checkpoint, segments)
        if end > checkpoint:
            segment.add(make_rows(range(checkpoint + 1, end + 1), float(attempt)))
    return segments


def test_steps_done_again_after_a_crash_replace_those_that_were_lost(uri):
    segments = make_crashed_run(uri)
    expected = [(step, 1.0 + (step - 1) // 10) for step in range(1, 31)]
    assert read_losses(uri) == expected
    finish(uri, segments)
    assert read_losses(uri) == expected


def test_rows_after_the_last_checkpoint_are_those_of_the_newest_start(uri):
    make_crashed_run(uri)
    third = MetricsSegment(uri, attempt=7, start_step=30)
    third.add(make_rows([31, 32], 9.0))
    assert read_losses(uri)[-3:] == [(30, 3.0), (31, 9.0), (32, 9.0)]


def test_rows_of_a_start_that_was_superseded_never_count(uri):
    segments = make_crashed_run(uri)
    # The first start is still alive somewhere, and goes on writing.
    first = MetricsSegment(uri, attempt=1)
    first.add(make_rows(range(1, 30), 1.0))
    assert read_losses(uri) == [(step, 1.0 + (step - 1) // 10) for step in range(1, 31)]
    finish(uri, segments)
    assert read_losses(uri) == [(step, 1.0 + (step - 1) // 10) for step in range(1, 31)]


def test_a_finished_run_needs_no_checkpoints(uri, tmp_path):
    finish(uri, make_crashed_run(uri))
    shutil.rmtree(storage.join(uri, "checkpoints"))
    assert len(read_losses(uri)) == 30


@pytest.mark.parametrize(
    "spoil", [lambda data: data.replace(b"1.0", b"1.5", 1), lambda data: data[:200], lambda data: b""]
)
def test_damaged_rows_are_refused(uri, spoil):
    make_crashed_run(uri)
    file = Path(uri, "metrics", "0001_from_00000000.jsonl")
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(DamagedError, match=r"0001_from_00000000.jsonl is damaged"):
        read_stage(uri)


def test_a_missing_segment_is_named(uri):
    make_crashed_run(uri)
    Path(uri, "metrics", "0002_from_00000010.jsonl").unlink()
    with pytest.raises(DamagedError, match=r"0002_from_00000010.jsonl is missing"):
        read_stage(uri)


def test_a_line_cut_short_by_a_crash_is_no_row(uri):
    MetricsSegment(uri, attempt=1).add(make_rows([1, 2]))
    with Path(uri, "metrics", "0001_from_00000000.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in read_stage(uri).metrics] == [1, 2]


def test_a_damaged_line_of_a_running_stage_is_named(uri):
    storage.write_bytes(storage.join(uri, "metrics", "0001_from_00000000.jsonl"), b'{"step": 1}\n{"step\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"0001_from_00000000.jsonl, line 2 is no row of JSON"):
        read_stage(uri)


def test_a_file_of_a_finished_stage_that_changed_is_refused(uri):
    storage.write_bytes(storage.join(uri, "scores.json"), b"{}")
    finish(uri, [])
    storage.write_bytes(storage.join(uri, "scores.json"), b"[]")
    with pytest.raises(DamagedError, match=r"scores.json does not match its checksum"):
        read_stage(uri)


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(NotFoundError):
        read_stage(str(tmp_path / "nothing"))


def test_a_panel_refuses_scores_that_do_not_fit_its_slices():
    scores = SubImageScores(np.ones(5), np.arange(2))
    with pytest.raises(DataError, match=r"'an image'.*\(5,\)"):
        SelectionPanel("an image", "", "", "", Image.new("RGB", (336, 336)), plan_slices(336, 336), (scores,))
