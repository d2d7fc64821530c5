"""Which engine trains: DeepSpeed for ZeRO 1 to 3, plain torch for stage 0."""

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
    """DeepSpeed for ZeRO 1 to 3, plain data-parallel torch for stage 0.

    Args:
        model: with its initial weights; what requires no gradient stays frozen.
        zero_stage: 0 to 3.
        dtype: of weights and activations; masters and moments are float32.
        device: of this worker.
        max_grad_norm: clipping.
        empty_inputs: a batch without answers; DeepSpeed needs one step on it before moments can be loaded.
        checkpoint: to resume from.
        options: of DeepSpeed's own configuration (`meteor.train.deepspeed_config`).

    Raises:
        CheckpointError: the checkpoint's names or shapes differ from the model's.
        SettingsError: training in float16, or an option that cannot be set.
    """
    if dtype == torch.float16:
        raise SettingsError(
            "llm.dtype=float16 is for answering: training in it needs loss scaling; take bfloat16 or float32"
        )
    if zero_stage == 0 and options:
        raise SettingsError(f"deepspeed={dict(options)} needs zero_stage 1 to 3, and it is 0: plain torch trains")
    if checkpoint is not None:
        load_weights(model, checkpoint)
    if zero_stage == 0:
        return TorchEngine(model, dtype, device, max_grad_norm, checkpoint)
    from meteor.train.deepspeed_engine import DeepSpeedEngine

    config = deepspeed_config(options, zero_stage=zero_stage, dtype=dtype, max_grad_norm=max_grad_norm)
    return DeepSpeedEngine(model, config, dtype, device, empty_inputs, checkpoint)


@contextmanager
def loading_for(*, zero_stage: int, dtype: torch.dtype, options: Mapping[str, Any] = _NOTHING) -> Iterator[None]:
    """Load a language model in the block as its engine will hold it: cut up over the workers under ZeRO-3."""
    if zero_stage != 3:
        yield
        return
    from meteor.train.deepspeed_engine import sharded_loading

    config = deepspeed_config(options, zero_stage=zero_stage, dtype=dtype, max_grad_norm=1.0)
    with sharded_loading(config):
        yield
