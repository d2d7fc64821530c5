"""Checkpoints in the background: copied to the host at a step, uploaded by a thread, visible when complete."""

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from meteor.checkpoint.folder import complete_checkpoints, prune, set_aside
from meteor.checkpoint.format import Checkpoint, Fragment, checkpoint_uri, num_written, publish, write_fragments
from meteor.errors import CheckpointError
from meteor.train.protocol import Engine, barrier, from_all_workers, on_first_worker, rank, world_size

_POLL_S = 0.1
_OWNER_POLL_S = 5.0
_PEERS_TIMEOUT_S = 1800.0


class CheckpointWriter:
    """Background writer of checkpoints under ``root``, one at a time.

    Every worker uploads its own fragments. When all have done so, the first worker writes the manifest and removes older
    checkpoints. A failed upload is raised by the next `save` or by `wait`.

    Args:
        engine: engine with the training state.
        root: folder or s3:// URI of the checkpoints.
        keep: number of newest complete checkpoints to keep, besides the best.
        is_owner: function that returns whether these workers still own ``root``. Without ownership nothing is completed or
            removed.
    """

    def __init__(self, engine: Engine, root: str, *, keep: int, is_owner: Callable[[], bool] = lambda: True) -> None:
        self._engine, self._root, self._keep, self._is_owner = engine, root, keep, is_owner
        self._attempt = on_first_worker(lambda: uuid.uuid4().hex[:8])
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
        if self._engine.rank == 0 and self._peers_are_done(uri) and self._is_owner():
            shapes, world_size = self._engine.shapes(), self._engine.world_size
            publish(uri, world_size=world_size, shapes=shapes, state=state, attempt=self._attempt)
            prune(self._root, keep=self._keep)

    def _peers_are_done(self, uri: str) -> bool:
        """Wait for the other workers by looking at the store, because this thread must not join in their collectives."""
        world_size, started = self._engine.world_size, time.monotonic()
        look_at = started + _OWNER_POLL_S
        while (num := num_written(uri, attempt=self._attempt, world_size=world_size)) < world_size:
            if self._abandoned.wait(_POLL_S):
                return False
            now = time.monotonic()
            # A new owner removes parts of this checkpoint, so that they would be waited for in vain.
            if now > look_at:
                if not self._is_owner():
                    return False
                look_at = now + _OWNER_POLL_S
            if now > started + _PEERS_TIMEOUT_S:
                raise CheckpointError(
                    f"{uri}: only {num} of {world_size} workers wrote their part in {_PEERS_TIMEOUT_S:.0f} s"
                )
        return True


def newest_sound_checkpoint(root: str) -> Checkpoint | None:
    """Find the newest complete checkpoint whose bytes are those that were written; None if there is none.

    All workers must call it: each reads a share of the fragments. A damaged checkpoint is set aside, and the one before it is
    tried (`problems_of_damaged` tells why).

    Args:
        root: folder or s3:// URI of the checkpoints.
    """
    while True:
        uri = on_first_worker(lambda: next(reversed(complete_checkpoints(root)), ""))
        if not uri:
            return None
        checkpoint, problem = None, ""
        try:
            checkpoint = Checkpoint(uri)
            checkpoint.verify(rank(), world_size())
        except CheckpointError as error:
            problem = str(error)
        problem = next(filter(None, from_all_workers(problem)), "")
        if not problem:
            return checkpoint
        on_first_worker(partial(set_aside, uri, problem))
