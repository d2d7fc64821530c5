"""Lines about long work come every few seconds, with rate and time left once they are known."""

from meteor import progress
from meteor.progress import ProgressLog


def test_lines_come_every_few_seconds(monkeypatch, caplog):
    now = iter([0.0, 0.0, 1.0, 5.0, 6.0, 15.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    log = ProgressLog("finetune: tokenising: samples")
    with caplog.at_level("INFO"):
        for done in (1_000, 41_000, 51_000, 141_000):
            log(done, 665_298)
    assert caplog.messages == [
        "finetune: tokenising: samples 41,000 of 665,298, 10,000 per second, 1 min 02 s left",
        "finetune: tokenising: samples 141,000 of 665,298, 10,000 per second, 52 s left",
    ]


def test_without_a_total_the_rate_is_said(monkeypatch, caplog):
    now = iter([0.0, 0.0, 1.0, 6.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    log = ProgressLog("finetune: reading: samples")
    with caplog.at_level("INFO"):
        log(4_000, None)
        log(24_000, None)
    assert caplog.messages == ["finetune: reading: samples 24,000, 4,000 per second"]
