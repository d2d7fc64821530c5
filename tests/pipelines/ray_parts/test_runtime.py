"""Lines that tell how far a long job is."""

import logging
import threading

import pytest

from pipelines.ray_parts.runtime import Pace, progress, progress_line


def paces(*seen):
    pace = Pace()
    return [pace.per_s(done, now_s) for now_s, done in seen]


def test_the_rate_counts_from_the_first_change_on():
    # Ten seconds of starting; then 4 at once, and 2 a second.
    assert paces((0, 0), (5, 0), (10, 4), (15, 14), (20, 24)) == [None, None, None, 2.0, 2.0]


def test_what_was_done_before_this_start_is_in_no_rate():
    assert paces((0, 1000), (30, 1001), (40, 1006)) == [None, None, 0.5]


def test_steps_that_are_done_again_after_a_resume_count_and_the_lost_ones_do_not():
    # 130 were reported, the checkpoint is of step 100.
    assert paces((0, 130), (30, 101), (40, 111), (50, 121)) == [None, None, 1.0, 1.0]
    # Workers are lost and resume while the driver goes on.
    assert paces((0, 0), (10, 10), (20, 30), (30, 15), (40, 20)) == [None, None, 2.0, None, 0.5]


def test_a_count_that_stands_still_slows_down():
    assert paces((0, 0), (10, 1), (20, 11), (30, 11)) == [None, None, 1.0, 0.5]


@pytest.mark.parametrize(
    ("per_s", "line"),
    [
        (None, "pretrain: step 120 of 4,650"),
        (1.4, "pretrain: step 120 of 4,650, 1.4 per second, 53 min 56 s left"),
        (0.125, "pretrain: step 120 of 4,650, 8 s each, 10 h 04 min left"),
    ],
)
def test_a_line_says_how_long_it_takes(per_s, line):
    assert progress_line("pretrain: step", 120, 4650, per_s) == line


def test_lines_are_logged_while_the_block_runs(caplog):
    caplog.set_level(logging.INFO, logger="pipelines.ray_parts.runtime")
    looked, counts = threading.Event(), iter([7, 8])

    def count():
        done = next(counts, 9)
        if done == 9:
            looked.set()
        return done

    with progress("images read:", 10, count, detail=lambda: ", 1 bad", every_s=0.01):
        assert looked.wait(10)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "images read: 8 of 10, 1 bad"
    assert all(line.startswith("images read: 9 of 10, ") and line.endswith(" left, 1 bad") for line in lines[1:])
    assert not [thread for thread in threading.enumerate() if thread.name == "progress of images read:"]


def test_until_the_first_step_the_lines_say_that_workers_start(caplog):
    caplog.set_level(logging.INFO, logger="pipelines.ray_parts.runtime")
    # Resumed at step 120: the count is not 0 before workers run.
    looked, counts = threading.Event(), iter([120, 120, 120, 121])

    def count():
        done = next(counts, 122)
        if done == 122:
            looked.set()
        return done

    with progress("pretrain: step", 200, count, starting="pretrain: starting 2 workers", every_s=0.01):
        assert looked.wait(10)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == ["pretrain: starting 2 workers"] * 2
    assert lines[2].startswith("pretrain: step 121 of 200")
