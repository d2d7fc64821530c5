"""One checkpoint at once, for tests that need no writer beside the steps."""

from contextlib import closing
from typing import Any

from meteor.train.checkpoints import CheckpointWriter
from meteor.train.protocol import Engine


def save_checkpoint(engine: Engine, root: str, step: int, *, keep: int, **state: Any) -> None:
    """Write a checkpoint, complete when this returns on all workers."""
    with closing(CheckpointWriter(engine, root, keep=keep)) as writer:
        writer.save(step, state)
        writer.finish()
