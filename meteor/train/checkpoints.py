"""Checkpoints in the background: copied to the host at a step, uploaded by a thread, visible when complete."""

import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from meteor.checkpoint.format import Fragment, checkpoint_uri, num_written, prune, publish, write_fragments
from meteor.errors import CheckpointError
from meteor.train.protocol import Engine, agree, barrier

_POLL_S = 0.1
_PEERS_TIMEOUT_S = 1800.0


class CheckpointWriter:
    """Background writer of checkpoints under ``root``, one at a time.

    Every worker uploads its own fragments. When all have done so, the first worker writes the manifest and removes older
    checkpoints. A failed upload is raised by the next `save` or by `wait`.

    Args:
        engine: engine with the training state.
        root: folder or s3:// URI of the checkpoints.
        keep: number of newest complete checkpoints to keep, besides the best.
    """

    def __init__(self, engine: Engine, root: str, *, keep: int) -> None:
        self._engine, self._root, self._keep = engine, root, keep
        self._attempt = agree(uuid.uuid4().hex[:8])
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._abandoned = threading.Event()

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Copy the training state after ``step`` steps and return, once the previous checkpoint is written.

        Args:
            step: number of finished steps.
            state: JSON values for the manifest.
        """
        self.wait()
        # With CPU offload, and on a CPU, fragments are views of tensors that the next step changes.
        copies = [
            Fragment(part.kind, part.name, part.offset, part.values.detach().to("cpu", torch.float32, copy=True))
            for part in self._engine.fragments()
        ]
        self._pending = self._pool.submit(self._write, step, copies, {"step": step, **state})

    def wait(self) -> None:
        """Wait until this worker's part is written or, on the first worker, until the checkpoint is complete."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def finish(self) -> None:
        """Wait on all workers until the last checkpoint is complete."""
        self.wait()
        barrier()

    def close(self) -> None:
        """End the thread without waiting for other workers, which may be gone after a failure."""
        self._abandoned.set()
        self._pool.shutdown()

    def _write(self, step: int, fragments: list[Fragment], state: dict[str, Any]) -> None:
        uri = checkpoint_uri(self._root, step)
        write_fragments(uri, self._engine.rank, fragments, attempt=self._attempt)
        if self._engine.rank == 0 and self._peers_are_done(uri):
            shapes, world_size = self._engine.shapes(), self._engine.world_size
            publish(uri, world_size=world_size, shapes=shapes, state=state, attempt=self._attempt)
            prune(self._root, keep=self._keep)

    def _peers_are_done(self, uri: str) -> bool:
        """Wait for the other workers by looking at the store, because this thread must not join in their collectives."""
        world_size, deadline = self._engine.world_size, time.monotonic() + _PEERS_TIMEOUT_S
        while (num := num_written(uri, attempt=self._attempt, world_size=world_size)) < world_size:
            if self._abandoned.wait(_POLL_S):
                return False
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{uri}: only {num} of {world_size} workers wrote their part in {_PEERS_TIMEOUT_S:.0f} s"
                )
        return True
