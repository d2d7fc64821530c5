"""The one training loop: batches in planned order, the global loss, metrics, checkpoints."""

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from meteor.data.collate import Batch
from meteor.data.order import MicroBatch
from meteor.train.checkpoints import CheckpointWriter
from meteor.train.flops import ModelFlops
from meteor.train.plan import Recipe, StepPlan
from meteor.train.protocol import Engine
from meteor.train.step import LoadedStep, Wishes, rates, take_step

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
    flops: ModelFlops | None = None,
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
        flops: of the model; with them ``mfu`` is among the metrics.

    Raises:
        FailedStepError: a loss or gradient is not finite, or the projector refuses features or scores that are not; the
            weights are those before the step.
    """
    writer = CheckpointWriter(engine, checkpoints, keep=recipe.keep_checkpoints)
    saving = _Saving(recipe, plan.num_steps, meet)
    with closing(writer), closing(_one_ahead(_loaded_steps(engine, plan, load_batches, start_step))) as steps:
        clock = time.perf_counter()
        for loaded, wait_s in _timed(steps):
            row, wishes = take_step(engine, plan, recipe, loaded, wait_s, saving.wishes())
            # With what came after the step before: reports, copies for a checkpoint.
            seconds = time.perf_counter() - clock
            clock += seconds
            row |= rates(row, seconds, engine.world_size)
            if flops is not None:
                num_flops = flops.count(plan.lengths(loaded.step), row["num_visual_tokens"], row["num_answer_tokens"])
                row["mfu"] = num_flops / (seconds * engine.world_size * flops.peak)
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


class _Saving:
    """When checkpoints are due: by count, by the first worker's clock, and when a machine is about to go."""

    def __init__(self, recipe: Recipe, num_steps: int, meet: Callable[[], bool]) -> None:
        self._recipe, self._num_steps, self._meet = recipe, num_steps, meet
        self._last_checkpoint = self._last_meeting = time.monotonic()
        self._was_urgent = False

    def wishes(self) -> Wishes:
        """To be asked on the first worker and told to all."""
        now = time.monotonic()
        return Wishes(
            checkpoint=now - self._last_checkpoint >= self._recipe.checkpoint_every_s,
            meet=now - self._last_meeting >= _MEET_EVERY_S,
        )

    def decide(self, done: int, wishes: Wishes) -> tuple[bool, bool]:
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


def _loaded_steps(
    engine: Engine, plan: StepPlan, load_batches: LoadBatches, start_step: int
) -> Generator[LoadedStep, None, None]:
    """Each step from ``start_step`` on with this worker's micro batches; one loader sees the rest of the run."""
    steps, coming = itertools.tee(
        (step, plan.micro_steps(step, engine.rank, engine.world_size)) for step in plan.steps(start_step)
    )
    with closing(load_batches(rows for _, micro_steps in coming for rows in micro_steps)) as batches:
        for step, micro_steps in steps:
            yield LoadedStep(step, [next(batches) for _ in micro_steps])


def _one_ahead(steps: Generator[LoadedStep, None, None]) -> Generator[LoadedStep, None, None]:
    """Load the next step's batches in a thread while the current one trains."""
    # The thread ends first, then what it was reading from.
    with closing(steps), ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(next, steps, None)
        while (loaded := pending.result()) is not None:
            pending = pool.submit(next, steps, None)
            yield loaded


def _timed(steps: Iterator[LoadedStep]) -> Iterator[tuple[LoadedStep, float]]:
    """Each with the seconds it was waited for."""
    while True:
        started = time.perf_counter()
        loaded = next(steps, None)
        if loaded is None:
            return
        yield loaded, time.perf_counter() - started
