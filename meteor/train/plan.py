"""A stage's steps as arithmetic: which samples each one has, and what a worker does of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from meteor.data.order import MicroBatch, assign, epoch_order, pack
from meteor.data.table import SampleTable

Batching = Literal["padded", "grouped", "packed"]


@dataclass(frozen=True)
class Recipe:
    """What is done with the samples; see `meteor.config.StageSettings` for the meaning of each.

    ``native_weight_full`` is the native expert's weight after the warm-up, None for projectors without one.
    """

    lr: float
    global_batch_size: int
    micro_batch_size: int
    epochs: int
    warmup_ratio: float
    seed: int
    native_warmup: float
    native_weight_full: float | None
    aux_loss_coefficient: float
    batching: Batching
    max_length: int
    checkpoint_every_steps: int | None
    checkpoint_every_s: float
    keep_checkpoints: int


@dataclass(frozen=True)
class Step:
    """One optimiser step of the plan: position in the whole stage, and the samples of its global batch."""

    index: int
    epoch: int
    positions: Sequence[int]


class StepPlan:
    """All steps of a stage as arithmetic: f(seed, epoch, index digest); the same on every worker and after every crash."""

    def __init__(self, table: SampleTable, recipe: Recipe, index_digest: str) -> None:
        self._table, self._recipe, self._index_digest = table, recipe, index_digest
        self.sample_ids = table.sample_ids
        self.steps_per_epoch = math.ceil(len(table) / recipe.global_batch_size)
        self.num_steps = self.steps_per_epoch * recipe.epochs

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Steps ``start`` ... ``num_steps`` - 1."""
        for epoch in range(start // max(self.steps_per_epoch, 1), self._recipe.epochs):
            batches = epoch_order(
                self._table.grouping_lengths,
                global_batch_size=self._recipe.global_batch_size,
                seed=self._recipe.seed,
                epoch=epoch,
                index_digest=self._index_digest,
                group=self._recipe.batching == "grouped",
            )
            first = epoch * self.steps_per_epoch
            for i in range(max(start - first, 0), len(batches)):
                yield Step(first + i, epoch, batches[i])

    def micro_steps(self, step: Step, rank: int, world_size: int) -> list[MicroBatch]:
        """This worker's micro batches; every worker has equally many, some may be empty."""
        size, lengths = self._recipe.micro_batch_size, self._table.lengths
        if self._recipe.batching == "packed":
            rows = pack(step.positions, lengths, capacity=self._recipe.max_length, multiple=world_size * size)
        else:
            rows = [[position] for position in step.positions]
        return assign(rows, lengths, world_size=world_size, micro_batch_size=size)[rank]

    def epochs_done(self, step: Step) -> float:
        """Passes over the samples when the step is over, whole and begun."""
        return step.epoch + (step.index + 1 - step.epoch * self.steps_per_epoch) / self.steps_per_epoch

    def lengths(self, step: Step) -> list[int]:
        """Tokens of each of its samples, visual ones included."""
        return [self._table.lengths[position] for position in step.positions]

    def num_answer_tokens(self, step: Step) -> int:
        """What the loss of the global batch is divided by."""
        return sum(self._table.num_answer_tokens(position) for position in step.positions)
