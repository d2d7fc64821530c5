"""Plan of a stage by arithmetic: the samples of each step, and each worker's share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any, Literal

from meteor.data.order import (
    MicroBatch,
    Part,
    assign,
    epoch_length,
    epoch_order,
    epoch_samples,
    pack,
    steps_per_epoch,
)
from meteor.data.table import SampleTable

Batching = Literal["padded", "grouped", "packed"]


@dataclass(frozen=True)
class Recipe:
    """Settings of the training loop; `meteor.config.StageSettings` describes those with equal names.

    Attributes:
        native_weight_full: weight of the native expert after the warm-up; None for projectors without this expert.
        checkpoint_every_s: seconds between checkpoints.
        has_dropout: whether the model has dropout. If so, each step seeds torch's random numbers, so that a resumed run
            draws the numbers of an uninterrupted run.
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
    has_dropout: bool = False


@dataclass(frozen=True)
class Step:
    """Optimiser step of the plan.

    Attributes:
        index: number of the step in the whole stage, from 0.
        epoch: number of the epoch, from 0.
        positions: table positions of the global batch's samples.
    """

    index: int
    epoch: int
    positions: Sequence[int]


@dataclass(frozen=True)
class StepLayout:
    """Mean layout of a step.

    Attributes:
        rows: number of rows of the global batch.
        micro_steps: number of micro steps per worker.
        padding_share: share of padding among all token places of the rows, 0 to 1.
    """

    rows: float
    micro_steps: float
    padding_share: float


def first_steps(parts: Sequence[Part], *, global_batch_size: int, epochs: int) -> list[int]:
    """List the index of each epoch's first step, and last the number of all steps."""
    lengths = (epoch_length(parts, epoch) for epoch in range(epochs))
    return list(accumulate((steps_per_epoch(length, global_batch_size) for length in lengths), initial=0))


class StepPlan:
    """All steps of a stage as a function of seed, epoch and index digest, equal on every worker and after every crash.

    Args:
        table: samples of the stage.
        recipe: batch sizes, epochs and seed.
        index_digest: digest of the dataset index, which enters the order.
    """

    def __init__(self, table: SampleTable, recipe: Recipe, index_digest: str) -> None:
        self._table, self._recipe, self._index_digest = table, recipe, index_digest
        self.sample_ids = table.sample_ids
        size, epochs = recipe.global_batch_size, recipe.epochs
        self._firsts = first_steps(table.parts, global_batch_size=size, epochs=epochs)
        self.num_steps = self._firsts[-1]

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Yield the steps ``start`` ... ``num_steps`` - 1."""
        for epoch, (first, end) in enumerate(pairwise(self._firsts)):
            if start < end:
                for i, positions in enumerate(self._epoch(epoch)[max(start - first, 0) :], max(start, first)):
                    yield Step(i, epoch, positions)

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Return the global batches of an epoch as positions in the table."""
        context: dict[str, Any] = {"seed": self._recipe.seed, "epoch": epoch, "index_digest": self._index_digest}
        samples = epoch_samples(self._table.parts, **context)
        batches = epoch_order(
            [self._table.grouping_lengths[sample] for sample in samples],
            global_batch_size=self._recipe.global_batch_size,
            group=self._recipe.batching == "grouped",
            **context,
        )
        return [[samples[i] for i in batch] for batch in batches]

    def micro_steps(self, step: Step, rank: int, world_size: int) -> list[MicroBatch]:
        """Return a worker's micro batches; every worker has an equal number, and some may be empty."""
        size, lengths = self._recipe.micro_batch_size, self._table.lengths
        if self._recipe.batching == "packed":
            rows = pack(step.positions, lengths, capacity=self._recipe.max_length, multiple=world_size * size)
        else:
            rows = [[position] for position in step.positions]
        return assign(rows, lengths, world_size=world_size, micro_batch_size=size)[rank]

    def sample_layout(self, world_size: int, *, num_steps: int = 20) -> "StepLayout":
        """Measure how the first ``num_steps`` steps, which are as random as any, fill rows and micro steps."""
        num_rows = num_micro_steps = num_tokens = num_places = 0
        steps = list(islice(self.steps(), num_steps))
        for step in steps:
            for rank in range(world_size):
                micro_steps = self.micro_steps(step, rank, world_size)
                num_micro_steps += len(micro_steps)
                for rows in micro_steps:
                    lengths = [sum(self._table.lengths[position] for position in row) for row in rows]
                    num_rows += len(rows)
                    num_tokens += sum(lengths)
                    num_places += len(rows) * max(lengths, default=0)
        return StepLayout(
            rows=num_rows / len(steps),
            micro_steps=num_micro_steps / len(steps) / world_size,
            padding_share=1 - num_tokens / max(num_places, 1),
        )

    def epochs_done(self, step: Step) -> float:
        """Return the number of passes over the samples after the step, as a fraction."""
        first, end = self._firsts[step.epoch : step.epoch + 2]
        return step.epoch + (step.index + 1 - first) / (end - first)

    def lengths(self, step: Step) -> list[int]:
        """Return the number of tokens of each sample of a step, visual tokens included."""
        return [self._table.lengths[position] for position in step.positions]

    def num_answer_tokens(self, step: Step) -> int:
        """Return the number of answer tokens of the global batch, by which its loss is divided."""
        return sum(self._table.num_answer_tokens(position) for position in step.positions)
