"""What the training loop asks of an engine, and what all engines share.

An engine takes the loss as it is, already divided by the answer tokens of the global batch, and *sums* gradients over micro
steps and workers, so that 1 x 4, 2 x 2 and 4 x 1 (workers x micro steps) give the same update.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn

from meteor.checkpoint.format import Checkpoint, Fragment
from meteor.errors import CheckpointError, SettingsError

BETAS, EPS = (0.9, 0.999), 1e-8


class MicroStep(NamedTuple):
    """What one micro step gives, on the engine's device and without gradient.

    Attributes:
        loss: 0-d float32, the share of the global batch's loss.
        selection_sums: (`meteor.projector.statistics.NUM_SUMS`,) float32; None where the projector does not select.
    """

    loss: torch.Tensor
    selection_sums: torch.Tensor | None


class Engine(Protocol):
    """What the training loop needs."""

    rank: int
    world_size: int
    device: torch.device

    def forward_backward(self, inputs: dict[str, Any], *, last: bool) -> MicroStep:
        """Add one micro step's gradients; ``last`` marks the last one before `step`."""

    def evaluate(self, inputs: dict[str, Any]) -> MicroStep:
        """The same numbers without gradients. Collective under ZeRO-3."""

    def step(self, lr: float) -> float:
        """Update the weights and forget the gradients.

        Returns:
            The gradients' norm before clipping. Where it is not finite the weights are left as they were.
        """

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of the training state, as views of it: copy what is to outlive the next step."""

    def shapes(self) -> dict[str, list[int]]:
        """Trained parameter -> shape."""


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over all workers; the tensor itself where there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def agree(value: str) -> str:
    """The first worker's value, on all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise SettingsError("no parameter of the model is trainable: unfreeze a part before making an engine")
    return parameters


def full_shape(parameter: nn.Parameter) -> list[int]:
    """The shape, of a parameter that ZeRO-3 has cut up too."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def check_fit(checkpoint: Checkpoint, parameters: dict[str, nn.Parameter]) -> None:
    """`CheckpointError` naming the first parameters that differ between the checkpoint and the trained part of a model."""
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
    """Copy the checkpoint's weights into the trained parameters of a model that no engine has yet.

    Of a parameter that ZeRO-3 has cut up a worker reads its own part.

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
    """(first element, number of elements) of the flattened parameter that this worker holds under ZeRO-3.

    All parts are of one size; the last ones may be padding in part or whole.
    """
    size = parameter.ds_tensor.ds_numel
    start = min(dist.get_rank() * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)
