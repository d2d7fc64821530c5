"""From rows and outcomes to what Prometheus sees; that it sees it, tests/cluster looks at."""

import pytest

from pipelines.ray_parts import live_metrics
from pipelines.ray_parts.live_metrics import COUNTERS, GAUGES, LiveMetrics


@pytest.fixture
def seen(monkeypatch):
    """(name, tags besides the stage's) -> value."""
    found = {}

    class Metric:
        def __init__(self, name, description, tag_keys):
            self._name, self._tags = name, tag_keys
            assert description

        def _key(self, tags):
            assert set(tags) == set(self._tags)
            assert (tags["run"], tags["stage"], tags["digest"]) == ("k64", "pretrain", "0123456789ab")
            return (self._name, *(tags[name] for name in self._tags[3:]))

        def inc(self, value, tags):
            found[self._key(tags)] = found.get(self._key(tags), 0) + value

        def set(self, value, tags):
            found[self._key(tags)] = value

    monkeypatch.setattr(live_metrics, "Counter", Metric)
    monkeypatch.setattr(live_metrics, "Gauge", Metric)
    return found


@pytest.fixture
def live():
    return LiveMetrics("k64", "pretrain", "0123456789abcdef")


def test_outcomes_are_counted(seen, live):
    good = {"reason": "", "num_sub_images": 3, "payload_bytes": 100, "device_s": 0.5}
    bad = {"reason": "not_finite", "num_sub_images": 0, "payload_bytes": 0, "device_s": 0.0}
    live.encoded([good, good, bad])
    live.encoded([good])
    live.quarantined(["missing", "missing"])
    live.answered(5)
    assert seen == {
        ("meteor_images_encoded",): 4,
        ("meteor_sub_images_encoded",): 9,
        ("meteor_feature_bytes",): 300,
        ("meteor_encoder_seconds",): 1.5,
        ("meteor_images_quarantined", "not_finite"): 1,
        ("meteor_images_quarantined", "missing"): 2,
        ("meteor_questions_answered",): 5,
    }


def test_steps_add_up_and_the_last_one_shows(seen, live):
    row = {"step": 1, "num_steps": 9, "loss": 2.0, "seconds": 0.5, "loader_wait_s": 0.1, "num_samples": 8}
    live.step(row)
    live.step({**row, "step": 2, "loss": 1.0, "mfu": 0.4})
    assert seen[("meteor_step",)] == 2
    assert seen[("meteor_loss",)] == 1.0
    assert seen[("meteor_step_seconds",)] == 1.0
    assert seen[("meteor_loader_wait_seconds",)] == pytest.approx(0.2)
    assert seen[("meteor_samples",)] == 16
    assert seen[("meteor_mfu",)] == 0.4
    # What a row does not have is not told as 0.
    assert ("meteor_memory_gb",) not in seen


def test_each_name_is_one_kind():
    assert not COUNTERS.keys() & GAUGES.keys()
    assert all(name.startswith("meteor_") for name in (*COUNTERS, *GAUGES))
