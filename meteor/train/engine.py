"""Engines that turn losses into weight updates: DeepSpeed (ZeRO 1 to 3), and plain torch as the readable truth.

Both take the loss as it is, already divided by the answer tokens of the global batch, and *sum* gradients over micro steps
and workers, so that 1 x 4, 2 x 2 and 4 x 1 (workers x micro steps) give the same update.
"""

import logging
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn

from meteor.checkpoint.format import KINDS, Checkpoint, Fragment
from meteor.errors import CheckpointError, SettingsError
from meteor.optional import import_optional

_BETAS, _EPS = (0.9, 0.999), 1e-8


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

    def step(self, lr: float) -> float:
        """Update the weights and forget the gradients. Returns the gradients' norm before clipping."""

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of the training state. Collective: every rank must exhaust it."""

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


def make_engine(
    model: nn.Module,
    *,
    zero_stage: int,
    dtype: torch.dtype,
    device: torch.device,
    max_grad_norm: float,
    empty_inputs: dict[str, Any],
    checkpoint: Checkpoint | None = None,
) -> Engine:
    """DeepSpeed for ZeRO 1 to 3, plain data-parallel torch for stage 0.

    Args:
        model: with its initial weights; what requires no gradient stays frozen.
        zero_stage: 0 to 3.
        dtype: of weights and activations; masters and moments are float32.
        device: of this worker.
        max_grad_norm: clipping.
        empty_inputs: a batch without answers; DeepSpeed needs one step on it before moments can be loaded.
        checkpoint: to resume from.

    Raises:
        CheckpointError: the checkpoint's names or shapes differ from the model's.
    """
    if checkpoint is not None:
        load_weights(model, checkpoint)
    if zero_stage == 0:
        return TorchEngine(model, dtype, device, max_grad_norm, checkpoint)
    return DeepSpeedEngine(model, zero_stage, dtype, device, max_grad_norm, empty_inputs, checkpoint)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise SettingsError("no parameter of the model is trainable: unfreeze a part before making an engine")
    return parameters


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the checkpoint's weights into the trained parameters; `CheckpointError` naming the first that differ."""
    parameters = trained_parameters(model)
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
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
    for name, parameter in parameters.items():
        parameter.copy_(checkpoint.read("weights", name))


class TorchEngine:
    """AdamW on fp32 masters; gradients are summed over workers at each step. Whole state on every worker."""

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        max_grad_norm: float,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.model = model.to(device=device, dtype=dtype)
        self.device, self.max_grad_norm = device, max_grad_norm
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._parameters = trained_parameters(self.model)
        self._masters = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in self._parameters.items()
        }
        self._optimizer = torch.optim.AdamW(self._masters.values(), lr=0.0, betas=_BETAS, eps=_EPS, weight_decay=0.0)
        if checkpoint is not None:
            self._load(checkpoint)

    def forward_backward(self, inputs: dict[str, Any], *, last: bool) -> MicroStep:
        output = self.model(**inputs)
        output.loss.backward()
        return MicroStep(output.loss.detach(), output.selection_sums)

    def step(self, lr: float) -> float:
        for name, parameter in self._parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self._masters[name].grad = all_reduce_sum(gradient.float())
            if parameter is not self._masters[name]:
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), self.max_grad_norm)
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._copy_masters_back()
        return float(norm)

    def fragments(self) -> Iterator[Fragment]:
        # Every worker holds everything; each writes every world_size-th parameter.
        for i, (name, master) in enumerate(self._masters.items()):
            if i % self.world_size == self.rank:
                state = self._optimizer.state[master]
                yield Fragment("weights", name, 0, master)
                for kind in KINDS[1:]:
                    yield Fragment(kind, name, 0, state[kind])

    def _load(self, checkpoint: Checkpoint) -> None:
        for name, master in self._masters.items():
            with torch.no_grad():
                master.copy_(checkpoint.read("weights", name))
            self._optimizer.state[master] = {
                "step": torch.tensor(float(checkpoint.state["step"])),
                **{kind: checkpoint.read(kind, name).to(self.device) for kind in KINDS[1:]},
            }

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def _copy_masters_back(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not self._masters[name]:
                parameter.copy_(self._masters[name])


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 1, 2 or 3; one parameter group, no weight decay (ZeRO-3 and state by name allow nothing else)."""

    def __init__(
        self,
        model: nn.Module,
        zero_stage: int,
        dtype: torch.dtype,
        device: torch.device,
        max_grad_norm: float,
        empty_inputs: dict[str, Any],
        checkpoint: Checkpoint | None,
    ) -> None:
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        deepspeed = import_optional("deepspeed", needed_for=f"zero_stage={zero_stage}", install="pip install deepspeed")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.device = device
        model.to(dtype)
        self._shapes = {name: list(p.shape) for name, p in trained_parameters(model).items()}
        config = {
            "train_micro_batch_size_per_gpu": 1,  # samples are counted by our own order planner
            "gradient_accumulation_steps": 1,  # boundaries are set by hand, see forward_backward
            "gradient_clipping": max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": zero_stage},
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
            "steps_per_print": 2**31,
        }
        self._parameters = trained_parameters(model)
        optimizer = torch.optim.AdamW(self._parameters.values(), lr=0.0, betas=_BETAS, eps=_EPS, weight_decay=0.0)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=not dist.is_initialized()
        )
        self._utils = import_optional("deepspeed.utils", needed_for="checkpoints", install="pip install deepspeed")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if checkpoint is not None:
            self._load(checkpoint, empty_inputs)

    def forward_backward(self, inputs: dict[str, Any], *, last: bool) -> MicroStep:
        self._engine.set_gradient_accumulation_boundary(last)
        output = self._engine(**inputs)
        # DeepSpeed averages over workers; the loss is already divided by the global batch's answer tokens.
        self._engine.backward(output.loss * self.world_size)
        if not last:
            self._engine.step()  # counts the micro step; updates nothing before the boundary
        return MicroStep(output.loss.detach(), output.selection_sums)

    def step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm() or 0.0)

    def fragments(self) -> Iterator[Fragment]:
        for i, (name, parameter) in enumerate(self._parameters.items()):
            for kind in KINDS:
                values = self._read(parameter, kind)  # collective: all ranks gather, one writes
                if i % self.world_size == self.rank:
                    yield Fragment(kind, name, 0, values)

    def _load(self, checkpoint: Checkpoint, empty_inputs: dict[str, Any]) -> None:
        """Masters and moments, exactly. The weights were loaded before `initialize`: under ZeRO-3 setting a master later
        leaves the low-precision copy stale; and moments exist only after a first step, so one is taken with lr 0."""
        self.forward_backward(empty_inputs, last=True)
        self.step(lr=0.0)
        for name, parameter in self._parameters.items():
            self._utils.safe_set_full_fp32_param(parameter, checkpoint.read("weights", name).to(self.device))
            for kind in KINDS[1:]:
                values = checkpoint.read(kind, name).to(self.device)
                self._utils.safe_set_full_optimizer_state(parameter, values, kind)
        for state in self._optimizer.optimizer.state.values():
            state["step"] = torch.tensor(float(checkpoint.state["step"]))

    def shapes(self) -> dict[str, list[int]]:
        return self._shapes

    def _read(self, parameter: nn.Parameter, kind: str) -> torch.Tensor:
        if kind == "weights":
            return self._utils.safe_get_full_fp32_param(parameter)
        return self._utils.safe_get_full_optimizer_state(parameter, kind)
