"""DeepSpeed with ZeRO 1, 2 or 3 as a training engine; no other file imports DeepSpeed."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from meteor.checkpoint.format import KINDS, Checkpoint, Fragment
from meteor.optional import import_optional
from meteor.train.deepspeed_config import offloads_optimizer
from meteor.train.protocol import BETAS, EPS, MicroStep, full_shape, rank, trained_parameters, world_size, zero3_part

_INSTALL = "pip install deepspeed accelerate"


@contextmanager
def sharded_loading(config: dict[str, Any]) -> Iterator[None]:
    """Make ``from_pretrained`` in the block shard each weight while loading, under ZeRO-3.

    The first worker reads the files and sends each parameter to the others. One host's memory holds one copy of the weights,
    and no device holds a whole copy. Other ZeRO stages load as usual.
    """
    if config["zero_optimization"]["stage"] != 3:
        yield
        return
    _import_deepspeed("sharded loading")
    helper = import_optional("transformers.integrations.deepspeed", needed_for="sharded loading", install=_INSTALL)
    # transformers keeps only a weak reference to this object, so it must live as long as the block.
    known = helper.HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        helper.unset_hf_deepspeed_config()
        del known


class DeepSpeedEngine:
    """DeepSpeed engine with one parameter group and no weight decay.

    ZeRO-3 and reading the optimiser state by parameter name do not work with several groups.
    """

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        empty_inputs: dict[str, Any],
        checkpoint: Checkpoint | None,
    ) -> None:
        deepspeed = _import_deepspeed(f"zero_stage={config['zero_optimization']['stage']}")
        self._utils = import_optional("deepspeed.utils", needed_for="checkpoints", install=_INSTALL)
        self.device = device
        model.to(dtype)
        self._parameters = trained_parameters(model)
        self._shapes = {name: full_shape(parameter) for name, parameter in self._parameters.items()}
        # On the host, DeepSpeed's own Adam counts steps in a place that checkpoints cannot reach, and a resumed run would
        # differ. On a GPU, torch's default Adam makes temporary copies of whole states. The fused Adam avoids both.
        fused = True if offloads_optimizer(config) or device.type == "cuda" else None
        optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=0.0, betas=BETAS, eps=EPS, weight_decay=0.0, fused=fused
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=not dist.is_initialized()
        )
        self.rank, self.world_size = rank(), world_size()
        if checkpoint is not None:
            self._load(checkpoint, empty_inputs)

    def forward_backward(self, inputs: dict[str, Any], *, last: bool) -> MicroStep:
        self._engine.set_gradient_accumulation_boundary(last)
        output = self._engine(**inputs, skip_logits=True)
        # DeepSpeed divides by the number of workers, but the loss is already divided by the global batch's answer tokens.
        self._engine.backward(output.loss * self.world_size)
        if not last:
            self._engine.step()  # counts the micro step; weights change only at the boundary
        return MicroStep(output.loss.detach(), output.selection_sums)

    @torch.no_grad()
    def evaluate(self, inputs: dict[str, Any]) -> MicroStep:
        training = self._engine.module.training
        self._engine.eval()
        output = self._engine(**inputs, skip_logits=True)
        self._engine.train(training)
        return MicroStep(output.loss, output.selection_sums)

    def step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()  # skips the update if the norm is not finite
        return float("inf") if self._optimizer.overflow else float(self._engine.get_global_grad_norm() or 0.0)

    def fragments(self) -> Iterator[Fragment]:
        for name, parameter in self._parameters.items():
            start, num_elements = _part(parameter)
            if num_elements:
                for kind in KINDS:
                    yield Fragment(kind, name, start, self._read(parameter, kind)[:num_elements])

    def shapes(self) -> dict[str, list[int]]:
        return self._shapes

    def _load(self, checkpoint: Checkpoint, empty_inputs: dict[str, Any]) -> None:
        """Load master weights and moments of this worker's parts, bit for bit.

        The weights were loaded before `initialize`, which made low-precision copies. Moments exist only after a first step,
        so a step with learning rate 0 is taken before they are overwritten.
        """
        self.forward_backward(empty_inputs, last=True)
        self.step(lr=0.0)
        for name, parameter in self._parameters.items():
            start, num_elements = _part(parameter)
            if num_elements:
                for kind in KINDS:
                    self._write(parameter, kind, checkpoint.read_range(kind, name, start, num_elements))
        for state in self._optimizer.optimizer.state.values():
            state["step"].fill_(checkpoint.state["step"])

    def _read(self, parameter: Any, kind: str) -> torch.Tensor:
        """Return this worker's part of a parameter's master weight or moment; padded under ZeRO-3."""
        if hasattr(parameter, "ds_tensor"):
            if kind == "weights":
                return self._utils.safe_get_local_fp32_param(parameter)
            return self._utils.safe_get_local_optimizer_state(parameter, kind)
        return parameter._hp_mapping.get_hp_fragment(None if kind == "weights" else kind)

    @torch.no_grad()
    def _write(self, parameter: Any, kind: str, values: torch.Tensor) -> None:
        if not hasattr(parameter, "ds_tensor"):
            self._read(parameter, kind).copy_(values)
            return
        padded = torch.zeros(parameter.ds_tensor.ds_numel, device=self.device)
        padded[: len(values)] = values
        if kind == "weights":
            self._utils.safe_set_local_fp32_param(parameter, padded)
        else:
            self._utils.safe_set_local_optimizer_state(parameter, padded, kind)


def _part(parameter: Any) -> tuple[int, int]:
    """Return first element and number of elements of this worker's part of the flattened parameter."""
    if hasattr(parameter, "ds_tensor"):
        return zero3_part(parameter)
    mapping = parameter._hp_mapping
    return (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)


def _import_deepspeed(needed_for: str) -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = import_optional("deepspeed", needed_for=needed_for, install=_INSTALL)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
