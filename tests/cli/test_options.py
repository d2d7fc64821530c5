"""How far a long command is, as its terminal shows it."""

import time

import pytest

from meteor.cli.options import show_progress


@pytest.fixture
def at_second(monkeypatch):
    def tell(second: float) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: second)

    return tell


def test_the_time_left_follows_from_what_this_run_did(at_second, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    show = show_progress("images")
    for second, done in [(100, 40), (101, 41), (160, 50), (400, 100)]:
        at_second(second)
        show(done, 100)
    # From the first call on: 10 images in 60 seconds, so 50 more take 5 minutes.
    assert capsys.readouterr().err.replace("\x1b[K", "").split("\r")[1:] == [
        "40 of 100 images",
        "41 of 100 images",
        "50 of 100 images, 5 min 00 s left",
        "100 of 100 images\n",
    ]


def test_nothing_is_shown_where_nobody_watches(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    assert show_progress("images") is None
