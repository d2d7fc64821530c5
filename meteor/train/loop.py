"""Training loop of both stages: batches in planned order, the global loss, metrics, checkpoints."""

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from meteor.data.collate import Batch
from meteor.data.order import CountedBatch
from meteor.train.checkpoints import CheckpointWriter
from meteor.train.flops import ModelFlops
from meteor.train.plan import Recipe, StepPlan
from meteor.train.protocol import Engine
from meteor.train.step import DueActions, LoadedStep, rates, take_step

# Function from coming micro batches, as table positions with a number of visual tokens per sub-image, to collated batches in
# this order. The generator may read ahead of the batches that it yields; closing it ends everything that it started.
LoadBatches = Callable[[Iterable[CountedBatch]], Generator[Batch, None, None]]

# A meeting holds up all workers: Ray Train accepts a report every two seconds, so meeting at every step would delay short
# steps.
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
    store: Callable[[], dict[str, Any]] = dict,
    is_owner: Callable[[], bool] = lambda: True,
    meet: Callable[[], bool] = lambda: False,
    evaluate: Callable[[], dict[str, float]] = dict,
    flops: ModelFlops | None = None,
) -> None:
    """Run the steps from ``start_step`` to the end of the plan.

    Args:
        engine: model and optimiser, already at ``start_step``.
        plan: samples of each step.
        recipe: learning rate, batch sizes and checkpoint intervals.
        load_batches: loader of the coming micro batches; it runs one step ahead in a thread.
        checkpoints: root URI of checkpoints, which are written every ``checkpoint_every_steps`` steps, every
            ``checkpoint_every_s`` seconds, and at the end.
        start_step: index of the first step to run.
        on_step: callback with the metrics of each step, numbers only and equal on all workers. If the projector selects
            tokens, they include `mean_selection`.
        store: callback on all workers before each checkpoint, which must persist the metrics given to `on_step`. It returns
            JSON values for the checkpoint's manifest.
        is_owner: callback that returns whether these workers still own ``checkpoints``; see `CheckpointWriter`.
        meet: callback on all workers at once, every few seconds and at the end. It returns, equally on all workers, whether
            a worker is about to lose its machine. If so, the step ends with a checkpoint, and training continues when the
            checkpoint is complete.
        evaluate: callback on all workers at once, before checkpoints that are not urgent. Its metrics are reported with the
            step and kept in the checkpoint's manifest.
        flops: FLOPs of the model, for the metric ``mfu``; None to omit the metric.

    Raises:
        FailedStepError: a loss or gradient is not finite, or the projector refuses values that are not finite. The weights
            remain those before the step.
    """
    writer = CheckpointWriter(engine, checkpoints, keep=recipe.keep_checkpoints, is_owner=is_owner)
    saving = _Saving(recipe, plan.num_steps, meet)
    with closing(writer), closing(_one_ahead(_loaded_steps(engine, plan, load_batches, start_step))) as steps:
        clock = time.perf_counter()
        for loaded, wait_s in _timed(steps):
            row, due, num_squares = take_step(engine, plan, recipe, loaded, wait_s, saving.due_actions())
            # The time includes work after the previous step, such as reports and copies for a checkpoint.
            seconds = time.perf_counter() - clock
            clock += seconds
            row |= rates(row, seconds, engine.world_size)
            if flops is not None:
                num_flops = flops.count(
                    num_tokens=row["num_visual_tokens"] + row["num_text_tokens"],
                    num_squares=num_squares,
                    num_visual_tokens=row["num_visual_tokens"],
                    num_answer_tokens=row["num_answer_tokens"],
                )
                row["mfu"] = num_flops / (seconds * engine.world_size * flops.peak)
            done = row["step"]
            is_due, is_urgent_now = saving.decide(done, due)
            evaluated = evaluate() if is_due and not is_urgent_now else {}
            on_step(row | evaluated)
            if is_due:
                # Metrics are stored before the checkpoint, because a run resumed from it does not repeat their steps.
                stored = store()
                writer.save(done, {"epoch": loaded.step.epoch, **evaluated, **stored})
            if is_urgent_now:
                writer.finish()
        writer.finish()
        meet()


class _Saving:
    """Decision when checkpoints are due: by steps, by the first worker's clock, or before a machine is lost."""

    def __init__(self, recipe: Recipe, num_steps: int, meet: Callable[[], bool]) -> None:
        self._recipe, self._num_steps, self._meet = recipe, num_steps, meet
        self._last_checkpoint = self._last_meeting = time.monotonic()
        self._was_urgent = False

    def due_actions(self) -> DueActions:
        """Return the actions that are due by this worker's clock; only those of the first worker count."""
        now = time.monotonic()
        return DueActions(
            checkpoint=now - self._last_checkpoint >= self._recipe.checkpoint_every_s,
            meet=now - self._last_meeting >= _MEET_EVERY_S,
        )

    def decide(self, done: int, due: DueActions) -> tuple[bool, bool]:
        """Decide, equally on all workers, whether a checkpoint follows after ``done`` steps, and whether it is urgent."""
        became_urgent = False
        if due.meet:
            urgent, self._last_meeting = self._meet(), time.monotonic()
            became_urgent, self._was_urgent = urgent and not self._was_urgent, urgent
        every = self._recipe.checkpoint_every_steps
        is_regular = done == self._num_steps or (every is not None and done % every == 0)
        is_due = is_regular or due.checkpoint or became_urgent
        if is_due:
            self._last_checkpoint = time.monotonic()
        return is_due, became_urgent


def _loaded_steps(
    engine: Engine, plan: StepPlan, load_batches: LoadBatches, start_step: int
) -> Generator[LoadedStep, None, None]:
    """Yield each step from ``start_step`` with this worker's micro batches; a single loader sees the rest of the run."""
    steps, coming = itertools.tee(
        (step, plan.micro_steps(step, engine.rank, engine.world_size)) for step in plan.steps(start_step)
    )
    with closing(load_batches((rows, step.k) for step, micro_steps in coming for rows in micro_steps)) as batches:
        for step, micro_steps in steps:
            yield LoadedStep(step, [next(batches) for _ in micro_steps])


def _one_ahead(steps: Generator[LoadedStep, None, None]) -> Generator[LoadedStep, None, None]:
    """Load the next step's batches in a thread while the current one trains."""
    # The pool is listed last so that its thread ends before the steps, from which it reads, are closed.
    with closing(steps), ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(next, steps, None)
        while (loaded := pending.result()) is not None:
            pending = pool.submit(next, steps, None)
            yield loaded


def _timed(steps: Iterator[LoadedStep]) -> Iterator[tuple[LoadedStep, float]]:
    """Yield each step with the seconds that the loop waited for it."""
    while True:
        started = time.perf_counter()
        loaded = next(steps, None)
        if loaded is None:
            return
        yield loaded, time.perf_counter() - started
