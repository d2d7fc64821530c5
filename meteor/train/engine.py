"""Choice of the training engine: DeepSpeed for ZeRO 1 to 3, plain torch for ZeRO stage 0."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from meteor.checkpoint.format import Checkpoint
from meteor.errors import SettingsError
from meteor.train.deepspeed_config import deepspeed_config
from meteor.train.protocol import Engine, load_weights
from meteor.train.torch_engine import TorchEngine

_NOTHING: Mapping[str, Any] = {}


def make_engine(
    model: nn.Module,
    *,
    zero_stage: int,
    dtype: torch.dtype,
    device: torch.device,
    max_grad_norm: float,
    empty_inputs: dict[str, Any],
    checkpoint: Checkpoint | None = None,
    options: Mapping[str, Any] = _NOTHING,
) -> Engine:
    """Make an engine: DeepSpeed for ZeRO 1 to 3, plain data-parallel torch for ZeRO stage 0.

    Args:
        model: model with its initial weights; parameters that require no gradient stay frozen.
        zero_stage: ZeRO stage, 0 to 3.
        dtype: dtype of weights and activations; master weights and moments are float32.
        device: device of this worker.
        max_grad_norm: norm to which gradients are clipped.
        empty_inputs: batch without answers, on which DeepSpeed takes a step before moments can be loaded.
        checkpoint: checkpoint to resume from; None for a new run.
        options: part of DeepSpeed's own configuration (`meteor.train.deepspeed_config`).

    Raises:
        CheckpointError: the checkpoint's names or shapes differ from the model's.
        SettingsError: dtype is float16, or an option cannot be set.
    """
    if dtype == torch.float16:
        raise SettingsError(
            "llm.dtype=float16 is for answering only, because training would need loss scaling: use bfloat16 or float32"
        )
    if zero_stage == 0 and options:
        raise SettingsError(
            f"deepspeed={dict(options)} needs zero_stage 1 to 3, but it is 0, which trains with plain torch"
        )
    if checkpoint is not None:
        load_weights(model, checkpoint)
    if zero_stage == 0:
        return TorchEngine(model, dtype, device, max_grad_norm, checkpoint)
    from meteor.train.deepspeed_engine import DeepSpeedEngine

    config = deepspeed_config(options, zero_stage=zero_stage, dtype=dtype, max_grad_norm=max_grad_norm)
    return DeepSpeedEngine(model, config, dtype, device, empty_inputs, checkpoint)


@contextmanager
def loading_for(*, zero_stage: int, dtype: torch.dtype, options: Mapping[str, Any] = _NOTHING) -> Iterator[None]:
    """Load a language model in the block as its engine will hold it: sharded over the workers under ZeRO-3."""
    if zero_stage != 3:
        yield
        return
    from meteor.train.deepspeed_engine import sharded_loading

    config = deepspeed_config(options, zero_stage=zero_stage, dtype=dtype, max_grad_norm=1.0)
    with sharded_loading(config):
        yield
