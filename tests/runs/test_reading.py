"""A stage's run read back from its folder, and what a panel refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from meteor import storage
from meteor.errors import DataError, NotFoundError
from meteor.image.slicing import plan_slices
from meteor.report import SelectionPanel, SubImageScores
from meteor.runs.reading import read_stage


def make_run_folder(tmp_path, segments, *, summary=None):
    uri = str(tmp_path / "runs" / "pretrain-abc")
    run = {"stage": "pretrain", "name": "demo", "digest": "abc", "settings": {"lr": 1}, "parent": None}
    storage.write_json(storage.join(uri, "run.json"), run)
    for start, content in segments.items():
        storage.write_bytes(storage.join(uri, "metrics", f"from_{start:08d}.jsonl"), content.encode())
    if summary is not None:
        storage.write_json(storage.join(uri, "summary.json"), summary)
    return uri


def make_lines(steps, loss=1.0):
    return "".join(json.dumps({"step": step, "loss": loss}) + "\n" for step in steps)


def test_a_finished_run_is_read_whole(tmp_path):
    run = read_stage(make_run_folder(tmp_path, {0: make_lines([1, 2])}, summary={"seconds": 5}))

    assert (run.stage, run.settings, run.summary, run.finished) == ("pretrain", {"lr": 1}, {"seconds": 5}, True)
    assert run.metrics == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]
    assert run.recorded == {"name": "demo", "digest": "abc", "parent": None}


def test_a_run_without_summary_is_not_finished(tmp_path):
    run = read_stage(make_run_folder(tmp_path, {}))
    assert (run.finished, run.summary, run.metrics) == (False, None, [])


def test_steps_done_again_after_a_crash_replace_those_that_were_lost(tmp_path):
    # The first attempt reached step 14, the second resumed at 10 and reached 25, the third resumed at 20.
    segments = {
        0: make_lines(range(1, 15), 1.0),
        20: make_lines(range(21, 31), 3.0),
        10: make_lines(range(11, 26), 2.0),
    }

    run = read_stage(make_run_folder(tmp_path, segments))

    assert [row["step"] for row in run.metrics] == list(range(1, 31))
    assert [row["loss"] for row in run.metrics] == [1.0] * 10 + [2.0] * 10 + [3.0] * 10


def test_a_resume_before_every_earlier_segment_replaces_them_all(tmp_path):
    segments = {0: make_lines(range(1, 4), 1.0), 2: make_lines([3, 4], 2.0)}
    run = read_stage(make_run_folder(tmp_path, segments))
    assert [(row["step"], row["loss"]) for row in run.metrics] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_a_line_cut_short_by_a_crash_is_no_row(tmp_path):
    run = read_stage(make_run_folder(tmp_path, {0: make_lines([1, 2]) + '{"step": 3, "lo'}))
    assert [row["step"] for row in run.metrics] == [1, 2]


def test_a_damaged_line_is_named(tmp_path):
    with pytest.raises(DataError, match=r"from_00000000.jsonl, line 2 is not JSON"):
        read_stage(make_run_folder(tmp_path, {0: '{"step": 1}\n{"step\n{"step": 3}\n'}))


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(NotFoundError):
        read_stage(str(tmp_path / "nothing"))


def test_a_panel_refuses_scores_that_do_not_fit_its_slices():
    scores = SubImageScores(np.ones(5), np.arange(2))
    with pytest.raises(DataError, match=r"'an image'.*\(5,\)"):
        SelectionPanel("an image", "", "", "", Image.new("RGB", (336, 336)), plan_slices(336, 336), (scores,))
