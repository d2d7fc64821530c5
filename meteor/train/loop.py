"""The one training loop: batches in planned order, the global loss, metrics, checkpoints."""

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from meteor.data.collate import Batch
from meteor.data.order import MicroBatch
from meteor.errors import TrainingError
from meteor.projector.statistics import NUM_SUMS, mean_selection
from meteor.train.checkpoints import CheckpointWriter
from meteor.train.plan import Recipe, Step, StepPlan
from meteor.train.protocol import Engine, all_reduce_sum
from meteor.train.schedule import learning_rate, native_weight

# The coming micro batches as table positions -> those batches collated, in the same order. It may look ahead of what it
# yields; closing it ends whatever it started.
LoadBatches = Callable[[Iterable[MicroBatch]], Generator[Batch, None, None]]

# A meeting holds up all workers: Ray Train takes one report every two seconds, so that one a step would make short steps wait.
_MEET_EVERY_S = 5.0


def train(
    engine: Engine,
    plan: StepPlan,
    recipe: Recipe,
    *,
    load_batches: LoadBatches,
    checkpoints: str,
    start_step: int,
    on_step: Callable[[dict[str, Any]], None],
    store: Callable[[], None] = lambda: None,
    meet: Callable[[], bool] = lambda: False,
    evaluate: Callable[[], dict[str, float]] = dict,
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
        store: called before each checkpoint: make what `on_step` was given outlive this process.
        meet: called on all workers at once, every few seconds and at the end; whether some worker is about to lose its
            machine, the same on all. The step after which it becomes so ends with a checkpoint, and training goes on when it
            is complete.
        evaluate: metrics of the weights before a checkpoint that is not urgent, on all workers at once; they are reported
            with the step and kept in the checkpoint's manifest.

    Raises:
        TrainingError: the loss is not finite, or the projector refuses features or scores that are not; the weights are
            those before the step.
    """
    writer = CheckpointWriter(engine, checkpoints, keep=recipe.keep_checkpoints)
    saving = _Saving(recipe, plan.num_steps, meet)
    with closing(writer), closing(_one_ahead(_loaded_steps(engine, plan, load_batches, start_step))) as steps:
        clock = time.perf_counter()
        for loaded, wait_s in _timed(steps):
            row, wishes = _take_step(engine, plan, recipe, loaded, saving.wishes())
            # With what came after the step before: reports, copies for a checkpoint.
            seconds = time.perf_counter() - clock
            clock += seconds
            row |= _rates(row, seconds, wait_s)
            done = row["step"]
            is_due, is_urgent_now = saving.decide(done, wishes)
            evaluated = evaluate() if is_due and not is_urgent_now else {}
            on_step(row | evaluated)
            if is_due:
                # The rows first: a run resumed from the checkpoint does not come back to their steps.
                store()
                writer.save(done, {"epoch": loaded.step.epoch, **evaluated})
            if is_urgent_now:
                writer.finish()
        writer.finish()
        meet()


class _Wishes(NamedTuple):
    """What the first worker's clock wants after a step; all act on it alike."""

    checkpoint: bool
    meet: bool


class _Saving:
    """When checkpoints are due: by count, by the first worker's clock, and when a machine is about to go."""

    def __init__(self, recipe: Recipe, num_steps: int, meet: Callable[[], bool]) -> None:
        self._recipe, self._num_steps, self._meet = recipe, num_steps, meet
        self._last_checkpoint = self._last_meeting = time.monotonic()
        self._was_urgent = False

    def wishes(self) -> _Wishes:
        """To be asked on the first worker and told to all."""
        now = time.monotonic()
        return _Wishes(
            checkpoint=now - self._last_checkpoint >= self._recipe.checkpoint_every_s,
            meet=now - self._last_meeting >= _MEET_EVERY_S,
        )

    def decide(self, done: int, wishes: _Wishes) -> tuple[bool, bool]:
        """Whether a checkpoint follows after ``done`` steps, and whether it is urgent; the same on all workers."""
        became_urgent = False
        if wishes.meet:
            urgent, self._last_meeting = self._meet(), time.monotonic()
            became_urgent, self._was_urgent = urgent and not self._was_urgent, urgent
        every = self._recipe.checkpoint_every_steps
        is_regular = done == self._num_steps or (every is not None and done % every == 0)
        is_due = is_regular or wishes.checkpoint or became_urgent
        if is_due:
            self._last_checkpoint = time.monotonic()
        return is_due, became_urgent


@dataclass(frozen=True)
class _LoadedStep:
    """A step with this worker's micro batches."""

    step: Step
    micro_batches: list[Batch]


def _take_step(
    engine: Engine, plan: StepPlan, recipe: Recipe, loaded: _LoadedStep, wishes: _Wishes
) -> tuple[dict[str, Any], _Wishes]:
    """One optimiser step: its metrics over all workers, and what the first worker wishes."""
    step = loaded.step
    lr = learning_rate(step.index, plan.num_steps, peak=recipe.lr, warmup_ratio=recipe.warmup_ratio)
    try:
        totals = _accumulate(engine, plan, recipe, loaded, wishes)
    except ValueError as error:
        raise _failure(step, str(error)) from error
    if not math.isfinite(totals.loss):
        raise _failure(step, f"the loss is {totals.loss}. Lower the learning rate, or use bfloat16 or float32.")
    grad_norm = engine.step(lr)
    if not math.isfinite(grad_norm):
        raise _failure(step, f"the gradient's norm is {grad_norm}. Lower the learning rate.")
    row = {
        "step": step.index + 1,
        "num_steps": plan.num_steps,
        "epoch": plan.epochs_done(step),
        "loss": totals.loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "num_samples": len(step.positions),
        "num_visual_tokens": totals.num_visual_tokens,
        "num_text_tokens": totals.num_text_tokens,
        "num_answer_tokens": plan.num_answer_tokens(step),
        "padding_share": totals.padding_share,
        **totals.selection,
    }
    return row, totals.wishes


def _rates(row: dict[str, Any], seconds: float, wait_s: float) -> dict[str, float]:
    return {
        "seconds": seconds,
        "loader_wait_s": wait_s,
        "samples_per_s": row["num_samples"] / seconds,
        "visual_tokens_per_s": row["num_visual_tokens"] / seconds,
        "text_tokens_per_s": row["num_text_tokens"] / seconds,
    }


def _failure(step: Step, problem: str) -> TrainingError:
    rows = f"{list(step.positions)[:8]}{' ...' if len(step.positions) > 8 else ''}"
    return TrainingError(f"step {step.index + 1}: {problem} Its samples are at table rows {rows} of samples.parquet")


@dataclass(frozen=True)
class _Totals:
    """Sums of one global batch over micro batches and workers.

    Attributes:
        loss: of the global batch.
        padding_share: of the rows; `varlen` attention leaves it out of the language model.
        selection: see `mean_selection`.
        wishes: of the first worker.
    """

    loss: float
    num_visual_tokens: int
    num_text_tokens: int
    padding_share: float
    selection: dict[str, float]
    wishes: _Wishes


def _accumulate(engine: Engine, plan: StepPlan, recipe: Recipe, loaded: _LoadedStep, wishes: _Wishes) -> _Totals:
    """Forward and backward of one global batch."""
    step, num_answer_tokens = loaded.step, plan.num_answer_tokens(loaded.step)
    extra: dict[str, Any] = {}
    if recipe.native_weight_full is not None:
        weight = native_weight(step.index, plan.num_steps, full=recipe.native_weight_full, warmup=recipe.native_warmup)
        extra["native_weight"] = torch.tensor(weight, device=engine.device)
    # On the device, so that the host does not wait for each micro step; one vector, so that every worker does the same one
    # reduction, whatever its batches held.
    sums = torch.zeros(6 + NUM_SUMS, dtype=torch.float64, device=engine.device)
    if engine.rank == 0:
        sums[4], sums[5] = wishes
    for i, batch in enumerate(loaded.micro_batches):
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
            last=i == len(loaded.micro_batches) - 1,
        )
        sums[0] += micro_step.loss
        sums[1] += batch.num_visual_tokens
        # The batch that stands in for no samples holds one token, which nobody wrote.
        if num_samples:
            sums[2] += batch.num_text_tokens
            sums[3] += batch.input_ids.numel()
        if micro_step.selection_sums is not None:
            sums[6:] += micro_step.selection_sums
    loss, num_visual, num_text, num_places, checkpoint, meet, *selection = all_reduce_sum(sums).tolist()
    return _Totals(
        loss=loss,
        num_visual_tokens=int(num_visual),
        num_text_tokens=int(num_text),
        padding_share=1 - (num_visual + num_text) / max(num_places, 1.0),
        selection=mean_selection(torch.tensor(selection, dtype=torch.float64)),
        wishes=_Wishes(checkpoint=bool(checkpoint), meet=bool(meet)),
    )


def _loaded_steps(
    engine: Engine, plan: StepPlan, load_batches: LoadBatches, start_step: int
) -> Generator[_LoadedStep, None, None]:
    """Each step from ``start_step`` on with this worker's micro batches; one loader sees the rest of the run."""
    steps, coming = itertools.tee(
        (step, plan.micro_steps(step, engine.rank, engine.world_size)) for step in plan.steps(start_step)
    )
    with closing(load_batches(rows for _, micro_steps in coming for rows in micro_steps)) as batches:
        for step, micro_steps in steps:
            yield _LoadedStep(step, [next(batches) for _ in micro_steps])


def _one_ahead(steps: Generator[_LoadedStep, None, None]) -> Generator[_LoadedStep, None, None]:
    """Load the next step's batches in a thread while the current one trains."""
    # The thread ends first, then what it was reading from.
    with closing(steps), ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(next, steps, None)
        while (loaded := pending.result()) is not None:
            pending = pool.submit(next, steps, None)
            yield loaded


def _timed(steps: Iterator[_LoadedStep]) -> Iterator[tuple[_LoadedStep, float]]:
    """Each with the seconds it was waited for."""
    while True:
        started = time.perf_counter()
        loaded = next(steps, None)
        if loaded is None:
            return
        yield loaded, time.perf_counter() - started
