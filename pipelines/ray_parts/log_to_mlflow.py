"""Callback in Ray Train's controller that sends metrics to MLflow.

It has a module of its own, because the controller imports the module before any worker starts and needs no model.
"""

import queue
import threading
from collections.abc import Mapping
from typing import Any

from ray.train import UserCallback

from meteor.runs.mlflow_log import StageLog


class LogToMlflow(UserCallback):
    """Callback that lives in Ray Train's controller, so that one MLflow run continues through restarts of the workers.

    A thread sends, so that a server that does not answer delays no step. `StageLog.close` sends the rows that are left at the
    end.
    """

    def __init__(self, log: StageLog) -> None:
        self._log = log
        self._rows: queue.SimpleQueue[Mapping[str, Any]] | None = None

    def after_report(self, run_context: Any, metrics: list[Mapping[str, Any]], checkpoint: Any) -> None:
        if self._rows is None:
            self._rows = queue.SimpleQueue()
            threading.Thread(target=self._send, name="log to MLflow", daemon=True).start()
        for row in metrics[0]["rows"]:
            self._rows.put(row)

    def _send(self) -> None:
        assert self._rows is not None
        while True:
            rows = [self._rows.get()]
            while not self._rows.empty():
                rows.append(self._rows.get())
            self._log.live(rows)
