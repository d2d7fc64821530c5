"""Optimiser step: forward and backward pass of a global batch, with its metrics or the reason of its failure."""

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


class DueActions(NamedTuple):
    """Actions that are due after a step by the first worker's clock; all workers act on them.

    Attributes:
        checkpoint: whether to write a checkpoint.
        meet: whether to call `meteor.train.loop.train`'s callback ``meet``.
    """

    checkpoint: bool
    meet: bool


@dataclass(frozen=True)
class LoadedStep:
    """Step of the plan with this worker's micro batches."""

    step: Step
    micro_batches: list[Batch]


def take_step(
    engine: Engine,
    plan: StepPlan,
    recipe: Recipe,
    loaded: LoadedStep,
    wait_s: float,
    due: DueActions,
) -> tuple[dict[str, Any], DueActions]:
    """Take one optimiser step.

    Args:
        engine, plan, recipe: arguments of `meteor.train.loop.train`.
        loaded: the step with this worker's micro batches.
        wait_s: seconds that this worker waited for its micro batches.
        due: actions that are due by this worker's clock.

    Returns:
        The step's metrics over all workers, and the actions that are due by the first worker's clock.

    Raises:
        FailedStepError: the loss or the gradient's norm is not finite, or the projector refuses its input. The weights
            remain those before the step.
    """
    step = loaded.step
    lr = learning_rate(step.index, plan.num_steps, peak=recipe.lr, warmup_ratio=recipe.warmup_ratio)
    try:
        totals = _accumulate(engine, plan, recipe, loaded, wait_s, due)
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
        # The longest wait of any worker, because the others wait for that worker within the step.
        "loader_wait_s": totals.wait_s,
        "memory_gb": totals.memory_bytes / 1e9,
    }
    return row, totals.due


def rates(row: Mapping[str, Any], seconds: float, num_workers: int) -> dict[str, float]:
    """Compute a step's rates.

    Args:
        row: metrics from `take_step`.
        seconds: duration of the step.
        num_workers: number of training workers.
    """
    return {
        "seconds": seconds,
        "loader_wait_share": min(row["loader_wait_s"] / seconds, 1.0),
        "samples_per_s": row["num_samples"] / seconds,
        "visual_tokens_per_s_per_gpu": row["num_visual_tokens"] / seconds / num_workers,
        "text_tokens_per_s_per_gpu": row["num_text_tokens"] / seconds / num_workers,
    }


@dataclass(frozen=True)
class _Totals:
    """Totals of a global batch over micro batches and workers.

    Attributes:
        micro_losses: shares of the loss, as [worker][micro batch].
        num_visual_tokens: number of visual tokens.
        num_text_tokens: number of text tokens.
        padding_share: share of padding in the rows, 0 to 1; `varlen` attention does not compute it.
        selection: metrics of `mean_selection`.
        due: actions that are due by the first worker's clock.
        wait_s: longest wait of any worker for its batches, in seconds.
        memory_bytes: largest memory of any worker, see `_peak_memory`.
    """

    micro_losses: list[list[float]]
    num_visual_tokens: int
    num_text_tokens: int
    padding_share: float
    selection: dict[str, float]
    due: DueActions
    wait_s: float
    memory_bytes: float

    @property
    def loss(self) -> float:
        """Loss of the global batch."""
        return sum(map(sum, self.micro_losses))


def _accumulate(
    engine: Engine, plan: StepPlan, recipe: Recipe, loaded: LoadedStep, wait_s: float, due: DueActions
) -> _Totals:
    """Run forward and backward pass of a global batch."""
    step, num_answer_tokens = loaded.step, plan.num_answer_tokens(loaded.step)
    extra: dict[str, Any] = {}
    if recipe.native_weight_full is not None:
        weight = native_weight(step.index, plan.num_steps, full=recipe.native_weight_full, warmup=recipe.native_warmup)
        extra["native_weight"] = torch.tensor(weight, device=engine.device)
    if recipe.has_dropout:
        torch.manual_seed(_seed(recipe.seed, step.index, engine.rank))
    numbers = _Numbers(engine, 2 + len(loaded.micro_batches))
    if engine.rank == 0:
        numbers.shared[3], numbers.shared[4] = due
    for i, batch in enumerate(loaded.micro_batches):
        num_samples = batch.num_samples
        inputs = batch.to(engine.device).as_inputs()
        micro_step = engine.forward_backward(
            {
                **inputs,
                **extra,
                "num_items_in_batch": num_answer_tokens,
                # The auxiliary loss is a mean over samples, like the loss over tokens, so that empty batches add nothing.
                "aux_loss_coefficient": recipe.aux_loss_coefficient * num_samples / len(step.positions),
            },
            last=i == len(loaded.micro_batches) - 1,
        )
        numbers.own[2 + i] = micro_step.loss
        numbers.shared[0] += batch.num_visual_tokens
        # A batch without samples holds a placeholder token, which is not counted.
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
        due=DueActions(checkpoint=bool(checkpoint), meet=bool(meet)),
        wait_s=max(waited for waited, *_ in of_workers),
        memory_bytes=max(memory for _, memory, *_ in of_workers),
    )


def _seed(*numbers: int) -> int:
    """Hash numbers to a seed of 63 bits."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def _peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: on a GPU since the last call, on a CPU since the process started."""
    if device.type != "cuda":
        # Linux reports ru_maxrss in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class _Numbers:
    """Numbers that workers exchange after a step, in a single vector and thus a single reduction.

    The vector is on the device, so that the host does not wait for each micro step.

    Attributes:
        shared: numbers that are summed over workers.
        own: this worker's row of a table. The other rows are zero, so that the sum over workers fills the table.
    """

    def __init__(self, engine: Engine, num_own: int) -> None:
        num_shared = 5 + NUM_SUMS
        size = num_shared + engine.world_size * num_own
        self._vector = torch.zeros(size, dtype=torch.float64, device=engine.device)
        self.shared = self._vector[:num_shared]
        self._table = self._vector[num_shared:].view(engine.world_size, num_own)
        self.own = self._table[engine.rank]

    def reduce(self) -> tuple[list[float], list[list[float]]]:
        """Sum over workers and return the shared sums and the table of all workers' rows."""
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
    """Turn nan and inf, which JSON does not have, into text."""
    return value if value is None or math.isfinite(value) else str(value)
