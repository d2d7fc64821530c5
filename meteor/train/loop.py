"""The one training loop: batches in planned order, the global loss, metrics, checkpoints."""

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from meteor.data.collate import Batch
from meteor.data.order import MicroBatch, assign, epoch_order, pack
from meteor.data.table import SampleTable
from meteor.errors import TrainingError
from meteor.projector.statistics import NUM_SUMS, mean_selection
from meteor.train.checkpoints import CheckpointWriter
from meteor.train.protocol import Engine, all_reduce_sum
from meteor.train.schedule import learning_rate, native_weight

# The coming micro batches as table positions -> those batches collated, in the same order. It may look ahead of what it
# yields; closing it ends whatever it started.
LoadBatches = Callable[[Iterable[MicroBatch]], Generator[Batch, None, None]]


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


LoadedStep = tuple[Step, list[Batch]]


# Asking whether a machine is about to go is a call that all workers make together.
_LOOK_EVERY_S = 5.0


class Wishes(NamedTuple):
    """What the first worker's clock wants after a step; all act on it alike."""

    checkpoint: bool
    look: bool


class _Clock:
    """When the first worker wishes for what."""

    def __init__(self, checkpoint_every_s: float) -> None:
        self._every_s = checkpoint_every_s
        self.last_checkpoint = self.last_look = time.monotonic()

    def wishes(self) -> Wishes:
        now = time.monotonic()
        return Wishes(now - self.last_checkpoint >= self._every_s, now - self.last_look >= _LOOK_EVERY_S)


class StepPlan:
    """All steps of a stage as arithmetic: f(seed, epoch, index digest); the same on every worker and after every crash."""

    def __init__(self, table: SampleTable, recipe: Recipe, index_digest: str) -> None:
        self._table, self._recipe, self._index_digest = table, recipe, index_digest
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

    def num_answer_tokens(self, step: Step) -> int:
        """What the loss of the global batch is divided by."""
        return sum(self._table.num_answer_tokens(position) for position in step.positions)


def train(
    engine: Engine,
    plan: StepPlan,
    recipe: Recipe,
    *,
    load_batches: LoadBatches,
    checkpoints: str,
    start_step: int,
    on_step: Callable[[dict[str, Any]], None],
    before_checkpoint: Callable[[], None] = lambda: None,
    is_urgent: Callable[[], bool] = lambda: False,
) -> None:
    """Run the steps from ``start_step`` to the end of the plan.

    Args:
        engine: model and optimiser, already at ``start_step``.
        plan: which samples when.
        recipe: learning rate and the like.
        load_batches: table positions of all coming micro batches -> the batches; runs one step ahead in a thread.
        checkpoints: root URI; one is written every ``checkpoint_every_steps`` steps and ``checkpoint_every_s`` seconds, and at
            the end.
        start_step: first step to do.
        on_step: gets the metrics of each step, the same on all workers; numbers only. What the selection did
            (`mean_selection`) is among them where the projector selects.
        before_checkpoint: called on all workers after `on_step`, before the state is copied.
        is_urgent: whether some worker is about to lose its machine; asked on all workers at once, every few seconds, and the
            same on all. The step after which it becomes so ends with a checkpoint, and training goes on when it is complete.

    Raises:
        TrainingError: the loss is not finite, or the projector refuses features or scores that are not; the weights are
            those before the step.
    """
    writer = CheckpointWriter(engine, checkpoints, keep=recipe.keep_checkpoints)
    with closing(writer), closing(_one_ahead(_loaded_steps(engine, plan, load_batches, start_step))) as loaded:
        clock, was_urgent = _Clock(recipe.checkpoint_every_s), False
        while True:
            started = time.perf_counter()
            try:
                step, micro_batches = next(loaded)
            except StopIteration:
                break
            wait_s = time.perf_counter() - started
            lr = learning_rate(step.index, plan.num_steps, peak=recipe.lr, warmup_ratio=recipe.warmup_ratio)
            try:
                loss, counts, selection, wishes = _accumulate(engine, plan, recipe, step, micro_batches, clock.wishes())
            except ValueError as error:
                raise _failure(step, str(error)) from error
            if not math.isfinite(loss):
                raise _failure(step, f"the loss is {loss}. Lower the learning rate, or use bfloat16 or float32.")
            grad_norm = engine.step(lr)
            if not math.isfinite(grad_norm):
                raise _failure(step, f"the gradient's norm is {grad_norm}. Lower the learning rate.")
            done = step.index + 1
            seconds = time.perf_counter() - started
            on_step(
                {
                    "step": done,
                    "num_steps": plan.num_steps,
                    "epoch": step.epoch + (done - step.epoch * plan.steps_per_epoch) / plan.steps_per_epoch,
                    "loss": loss,
                    "lr": lr,
                    "grad_norm": grad_norm,
                    "num_samples": len(step.positions),
                    **counts,
                    **selection,
                    "seconds": seconds,
                    "loader_wait_s": wait_s,
                    "samples_per_s": len(step.positions) / seconds,
                    "visual_tokens_per_s": counts["num_visual_tokens"] / seconds,
                    "text_tokens_per_s": counts["num_text_tokens"] / seconds,
                }
            )
            every = recipe.checkpoint_every_steps
            is_regular = done == plan.num_steps or (every is not None and done % every == 0)
            if wishes.look:
                urgent, clock.last_look = is_urgent(), time.monotonic()
                is_new, was_urgent = urgent and not was_urgent, urgent
            else:
                is_new = False
            if is_regular or wishes.checkpoint or is_new:
                # The rows first: a run resumed from the checkpoint does not come back to its steps.
                before_checkpoint()
                writer.save(done, {"epoch": step.epoch})
                clock.last_checkpoint = time.monotonic()
            if is_new:
                writer.finish()
        writer.finish()


def _failure(step: Step, problem: str) -> TrainingError:
    rows = f"{list(step.positions)[:8]}{' ...' if len(step.positions) > 8 else ''}"
    return TrainingError(f"step {step.index + 1}: {problem} Its samples are at table rows {rows} of samples.parquet")


def _accumulate(
    engine: Engine, plan: StepPlan, recipe: Recipe, step: Step, micro_batches: Sequence[Batch], wishes: Wishes
) -> tuple[float, dict[str, Any], dict[str, float], Wishes]:
    """Forward and backward of one global batch; loss, token counts and the selection's means are over all workers."""
    num_answer_tokens = plan.num_answer_tokens(step)
    extra: dict[str, Any] = {}
    if recipe.native_weight_full is not None:
        weight = native_weight(step.index, plan.num_steps, full=recipe.native_weight_full, warmup=recipe.native_warmup)
        extra["native_weight"] = torch.tensor(weight, device=engine.device)
    # On the device, so that the host does not wait for each micro step; one vector, so that every worker does the same one
    # reduction, whatever its batches held.
    totals = torch.zeros(6 + NUM_SUMS, dtype=torch.float64, device=engine.device)
    if engine.rank == 0:
        totals[4], totals[5] = wishes
    for i, batch in enumerate(micro_batches):
        num_samples = batch.num_samples
        inputs = batch.to(engine.device).as_inputs()
        micro_step = engine.forward_backward(
            {
                **inputs,
                **extra,
                "num_items_in_batch": num_answer_tokens,
                # A mean over samples, like the loss is one over tokens: empty batches add nothing.
                "aux_loss_coefficient": recipe.aux_loss_coefficient * num_samples / len(step.positions),
            },
            last=i == len(micro_batches) - 1,
        )
        totals[0] += micro_step.loss
        totals[1] += batch.num_visual_tokens
        # The batch that stands in for no samples holds one token, which nobody wrote.
        if num_samples:
            totals[2] += batch.num_text_tokens
            totals[3] += batch.input_ids.numel()
        if micro_step.selection_sums is not None:
            totals[6:] += micro_step.selection_sums
    totals = all_reduce_sum(totals).cpu()
    counts = {
        "num_visual_tokens": int(totals[1]),
        "num_text_tokens": int(totals[2]),
        "num_answer_tokens": num_answer_tokens,
        # Of the rows; `varlen` attention leaves it out of the language model.
        "padding_share": 1 - float(totals[1] + totals[2]) / max(float(totals[3]), 1.0),
    }
    agreed = Wishes(checkpoint=bool(totals[4]), look=bool(totals[5]))
    return float(totals[0]), counts, mean_selection(totals[6:]), agreed


def _loaded_steps(
    engine: Engine, plan: StepPlan, load_batches: LoadBatches, start_step: int
) -> Generator[LoadedStep, None, None]:
    """Each step from ``start_step`` on with this worker's micro batches; one loader sees the rest of the run."""
    steps, coming = itertools.tee(
        (step, plan.micro_steps(step, engine.rank, engine.world_size)) for step in plan.steps(start_step)
    )
    with closing(load_batches(positions for _, micro_steps in coming for positions in micro_steps)) as batches:
        for step, micro_steps in steps:
            yield step, [next(batches) for _ in micro_steps]


def _one_ahead(steps: Generator[LoadedStep, None, None]) -> Generator[LoadedStep, None, None]:
    """Load the next step's batches in a thread while the current one trains."""
    # The thread ends first, then what it was reading from.
    with closing(steps), ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(next, steps, None)
        while (loaded := pending.result()) is not None:
            pending = pool.submit(next, steps, None)
            yield loaded
