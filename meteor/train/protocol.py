"""Interface between the training loop and its engines, and functions that all engines share.

The loss of a micro step is already divided by the answer tokens of the global batch. An engine *sums* gradients over micro
steps and workers, so that 1 x 4, 2 x 2 and 4 x 1 (workers x micro steps) give equal updates.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from meteor.checkpoint.format import Checkpoint, Fragment
from meteor.errors import CheckpointError, MeteorError, SettingsError

T = TypeVar("T")
BETAS, EPS = (0.9, 0.999), 1e-8


class MicroStep(NamedTuple):
    """Result of a micro step, on the engine's device and without gradient.

    Attributes:
        loss: share of the global batch's loss, 0-d float32.
        selection_sums: sums of `meteor.projector.statistics`, (`meteor.projector.statistics.NUM_SUMS`,) float32; None if the
            projector does not select tokens.
    """

    loss: torch.Tensor
    selection_sums: torch.Tensor | None


class Engine(Protocol):
    """Engine that holds model and optimiser for the training loop."""

    rank: int
    world_size: int
    device: torch.device

    def forward_backward(self, inputs: dict[str, Any], *, last: bool) -> MicroStep:
        """Add the gradients of a micro step; ``last`` is True for the last micro step before `step`."""

    def evaluate(self, inputs: dict[str, Any]) -> MicroStep:
        """Compute a micro step's result without gradients; a collective operation under ZeRO-3."""

    def step(self, lr: float) -> float:
        """Update the weights and clear the gradients.

        Args:
            lr: learning rate of this step.

        Returns:
            The gradients' norm before clipping. If it is not finite, the weights are unchanged.
        """

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's share of the training state as views; copy whatever must outlive the next step."""

    def shapes(self) -> dict[str, list[int]]:
        """Return the shape of each trained parameter by name."""


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all workers in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def rank() -> int:
    """Return this worker's rank; 0 without other workers."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def on_first_worker(function: Callable[[], T]) -> T:
    """Call a function on the first worker; return its value, or raise its `MeteorError`, on all workers."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome = [function(), None]
        except MeteorError as error:
            outcome = [None, error]
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    value, failure = outcome
    if failure is not None:
        raise failure
    return value


def from_all_workers(value: str) -> list[str]:
    """Return the values of all workers, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values = [""] * world_size()
    dist.all_gather_object(values, value)
    return values


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise SettingsError("no parameter of the model is trainable: unfreeze a part before making an engine")
    return parameters


def full_shape(parameter: nn.Parameter) -> list[int]:
    """Return a parameter's shape before any sharding by ZeRO-3."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def check_fit(checkpoint: Checkpoint, parameters: dict[str, nn.Parameter]) -> None:
    """Check that a checkpoint holds a model's trained parameters.

    Raises:
        CheckpointError: names or shapes differ; the message names the first differences.
    """
    shapes = {name: full_shape(parameter) for name, parameter in parameters.items()}
    problems = [f"{name} is missing" for name in sorted(shapes.keys() - checkpoint.shapes.keys())]
    problems += [f"{name} is not in the model" for name in sorted(checkpoint.shapes.keys() - shapes.keys())]
    problems += [
        f"{name} is {checkpoint.shapes[name]}, the model has {shapes[name]}"
        for name in sorted(shapes.keys() & checkpoint.shapes.keys())
        if shapes[name] != checkpoint.shapes[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{checkpoint.uri} does not fit the model: {'; '.join(problems[:3])}{more}")


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the checkpoint's weights into the trained parameters of a model before an engine takes it.

    If ZeRO-3 has sharded a parameter, each worker reads its own part.

    Raises:
        CheckpointError: names or shapes differ.
    """
    parameters = trained_parameters(model)
    check_fit(checkpoint, parameters)
    for name, parameter in parameters.items():
        if hasattr(parameter, "ds_tensor"):
            start, num_elements = zero3_part(parameter)
            values = checkpoint.read_range("weights", name, start, num_elements)
            parameter.ds_tensor[:num_elements].copy_(values)
        else:
            parameter.copy_(checkpoint.read("weights", name))


def zero3_part(parameter: Any) -> tuple[int, int]:
    """Return first element and number of elements of this worker's part of a flattened parameter under ZeRO-3.

    All parts have equal size; the last parts may be padding, partly or wholly.
    """
    size = parameter.ds_tensor.ds_numel
    start = min(rank() * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)
