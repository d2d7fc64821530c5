"""Callback in Ray Train's controller that sends metrics to MLflow."""

import threading

from pipelines.ray_parts.log_to_mlflow import LogToMlflow


class SlowLog:
    """Notes what it is given; waits in its first call until it may go on."""

    def __init__(self):
        self.steps, self.may_go_on, self.has_all = [], threading.Event(), threading.Event()

    def live(self, rows):
        self.steps += [row["step"] for row in rows]
        assert self.may_go_on.wait(20)
        if rows[-1]["step"] == 6:
            self.has_all.set()


def test_a_server_that_does_not_answer_holds_nobody_up():
    log = SlowLog()
    callback = LogToMlflow(log)
    for step in (1, 3, 5):
        # Of every worker the same; and each call comes back at once.
        callback.after_report(None, [{"rows": [{"step": step}, {"step": step + 1}]}] * 2, None)
    log.may_go_on.set()
    assert log.has_all.wait(20)
    assert log.steps == [1, 2, 3, 4, 5, 6]
