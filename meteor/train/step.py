"""One optimiser step: forward and backward of a global batch, and what it measured, or why it failed."""

import hashlib
import math
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from meteor.data.collate import Batch
from meteor.errors import FailedStepError
from meteor.projector.statistics import NUM_SUMS, mean_selection
from meteor.train.plan import Recipe, Step, StepPlan
from meteor.train.protocol import Engine, all_reduce_sum
from meteor.train.schedule import learning_rate, native_weight


class Wishes(NamedTuple):
    """What the first worker's clock wants after a step; all act on it alike."""

    checkpoint: bool
    meet: bool


@dataclass(frozen=True)
class LoadedStep:
    """A step with this worker's micro batches."""

    step: Step
    micro_batches: list[Batch]


def take_step(
    engine: Engine,
    plan: StepPlan,
    recipe: Recipe,
    loaded: LoadedStep,
    wait_s: float,
    wishes: Wishes,
) -> tuple[dict[str, Any], Wishes]:
    """One optimiser step: its metrics over all workers, and what the first worker wishes.

    Args:
        engine, plan, recipe: see `meteor.train.loop.train`.
        loaded: what to train on.
        wait_s: how long it was waited for.
        wishes: this worker's.

    Raises:
        FailedStepError: the loss or the gradient's norm is not finite, or the projector refuses what it was given; the weights
            are those before the step.
    """
    step = loaded.step
    lr = learning_rate(step.index, plan.num_steps, peak=recipe.lr, warmup_ratio=recipe.warmup_ratio)
    try:
        totals = _accumulate(engine, plan, recipe, loaded, wait_s, wishes)
    except ValueError as error:
        raise _failure(engine, plan, step, str(error), lr=lr) from error
    loss, micro_losses = totals.loss, totals.micro_losses
    if not math.isfinite(loss):
        problem = f"the loss is {loss}. Lower the learning rate, or use bfloat16 or float32."
        raise _failure(engine, plan, step, problem, lr=lr, loss=loss, micro_losses=micro_losses)
    grad_norm = engine.step(lr)
    if not math.isfinite(grad_norm):
        problem = f"the gradient's norm is {grad_norm}. Lower the learning rate."
        raise _failure(engine, plan, step, problem, lr=lr, loss=loss, grad_norm=grad_norm, micro_losses=micro_losses)
    row = {
        "step": step.index + 1,
        "num_steps": plan.num_steps,
        "epoch": plan.epochs_done(step),
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "num_samples": len(step.positions),
        "num_visual_tokens": totals.num_visual_tokens,
        "num_text_tokens": totals.num_text_tokens,
        "num_answer_tokens": plan.num_answer_tokens(step),
        "padding_share": totals.padding_share,
        **totals.selection,
        # The slowest worker's; the others wait for it in the step.
        "loader_wait_s": totals.wait_s,
        "memory_gb": totals.memory_bytes / 1e9,
    }
    return row, totals.wishes


def rates(row: Mapping[str, Any], seconds: float, num_workers: int) -> dict[str, float]:
    """The metrics of a step that took so long, from what `take_step` says of it."""
    return {
        "seconds": seconds,
        "loader_wait_share": min(row["loader_wait_s"] / seconds, 1.0),
        "samples_per_s": row["num_samples"] / seconds,
        "visual_tokens_per_s_per_gpu": row["num_visual_tokens"] / seconds / num_workers,
        "text_tokens_per_s_per_gpu": row["num_text_tokens"] / seconds / num_workers,
    }


@dataclass(frozen=True)
class _Totals:
    """Numbers of one global batch over micro batches and workers.

    Attributes:
        micro_losses: [worker][micro batch], shares of the loss.
        padding_share: of the rows; `varlen` attention leaves it out of the language model.
        selection: see `mean_selection`.
        wishes: of the first worker.
        wait_s: of the worker that waited longest for its batches.
        memory_bytes: of the worker with most; see `_peak_memory`.
    """

    micro_losses: list[list[float]]
    num_visual_tokens: int
    num_text_tokens: int
    padding_share: float
    selection: dict[str, float]
    wishes: Wishes
    wait_s: float
    memory_bytes: float

    @property
    def loss(self) -> float:
        """Of the global batch."""
        return sum(map(sum, self.micro_losses))


def _accumulate(
    engine: Engine, plan: StepPlan, recipe: Recipe, loaded: LoadedStep, wait_s: float, wishes: Wishes
) -> _Totals:
    """Forward and backward of one global batch."""
    step, num_answer_tokens = loaded.step, plan.num_answer_tokens(loaded.step)
    extra: dict[str, Any] = {}
    if recipe.native_weight_full is not None:
        weight = native_weight(step.index, plan.num_steps, full=recipe.native_weight_full, warmup=recipe.native_warmup)
        extra["native_weight"] = torch.tensor(weight, device=engine.device)
    if recipe.has_dropout:
        torch.manual_seed(_seed(recipe.seed, step.index, engine.rank))
    numbers = _Numbers(engine, 2 + len(loaded.micro_batches))
    if engine.rank == 0:
        numbers.shared[3], numbers.shared[4] = wishes
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
        numbers.own[2 + i] = micro_step.loss
        numbers.shared[0] += batch.num_visual_tokens
        # The batch that stands in for no samples holds one token, which nobody wrote.
        if num_samples:
            numbers.shared[1] += batch.num_text_tokens
            numbers.shared[2] += batch.input_ids.numel()
        if micro_step.selection_sums is not None:
            numbers.shared[5:] += micro_step.selection_sums
    numbers.own[0], numbers.own[1] = wait_s, _peak_memory(engine.device)
    (num_visual, num_text, num_places, checkpoint, meet, *selection), of_workers = numbers.reduce()
    return _Totals(
        micro_losses=[micro_losses for _, _, *micro_losses in of_workers],
        num_visual_tokens=int(num_visual),
        num_text_tokens=int(num_text),
        padding_share=1 - (num_visual + num_text) / max(num_places, 1.0),
        selection=mean_selection(torch.tensor(selection, dtype=torch.float64)),
        wishes=Wishes(checkpoint=bool(checkpoint), meet=bool(meet)),
        wait_s=max(waited for waited, *_ in of_workers),
        memory_bytes=max(memory for _, memory, *_ in of_workers),
    )


def _seed(*numbers: int) -> int:
    """63 random-looking bits."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU since this was last asked; on a CPU the process's peak so far."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class _Numbers:
    """What the workers tell each other of a step, in one vector and so in one reduction, whatever their batches held.

    It lies on the device, so that the host does not wait for each micro step.

    Attributes:
        shared: summed over workers.
        own: a row of a table that all workers see whole: it is zero but for this worker's row, until it is summed.
    """

    def __init__(self, engine: Engine, num_own: int) -> None:
        num_shared = 5 + NUM_SUMS
        size = num_shared + engine.world_size * num_own
        self._vector = torch.zeros(size, dtype=torch.float64, device=engine.device)
        self.shared = self._vector[:num_shared]
        self._table = self._vector[num_shared:].view(engine.world_size, num_own)
        self.own = self._table[engine.rank]

    def reduce(self) -> tuple[list[float], list[list[float]]]:
        """The sums, and the table of all workers' rows."""
        all_reduce_sum(self._vector)
        return self.shared.tolist(), self._table.tolist()


def _failure(
    engine: Engine,
    plan: StepPlan,
    step: Step,
    problem: str,
    *,
    lr: float,
    loss: float | None = None,
    grad_norm: float | None = None,
    micro_losses: list[list[float]] | None = None,
) -> FailedStepError:
    samples = [
        {
            "id": plan.sample_ids[position],
            "row": position,
            "worker": worker,
            "micro_batch": i,
            "micro_batch_loss": _json_number(micro_losses[worker][i] if micro_losses else None),
        }
        for worker in range(engine.world_size)
        for i, rows in enumerate(plan.micro_steps(step, worker, engine.world_size))
        for row in rows
        for position in row
    ]
    failure = {
        "step": step.index + 1,
        "epoch": plan.epochs_done(step),
        "problem": problem,
        "lr": lr,
        "loss": _json_number(loss),
        "grad_norm": _json_number(grad_norm),
        "samples": samples,
    }
    return FailedStepError(f"step {step.index + 1}: {problem}", failure)


def _json_number(value: float | None) -> float | str | None:
    """JSON knows neither nan nor inf."""
    return value if value is None or math.isfinite(value) else str(value)
