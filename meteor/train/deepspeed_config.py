"""DeepSpeed's configuration: options that a run file may add, and reasons why others are fixed."""

from collections.abc import Mapping
from typing import Any

import torch

from meteor.errors import SettingsError

# Each option that a run file must not set, with the reason for the error message.
_SAMPLES = "the stage's global_batch_size and micro_batch_size set it, and the training plan counts samples itself"
_RESERVED = {
    "train_batch_size": _SAMPLES,
    "train_micro_batch_size_per_gpu": _SAMPLES,
    "gradient_accumulation_steps": _SAMPLES,
    "gradient_clipping": "the stage's max_grad_norm sets it",
    "optimizer": "it is AdamW with one parameter group and weight decay 0, because several groups break ZeRO-3 and "
    "checkpoints by name",
    "scheduler": "the stage's lr and warmup_ratio set it, as a function of the global step, so that a run can resume",
    "bf16": "llm.dtype sets it",
    "fp16": "llm.dtype sets it",
    "zero_optimization.stage": "the stage's zero_stage sets it",
    "zero_optimization.load_from_fp32_weights": "master weights come from this project's own checkpoints",
}
_OFFLOADS = ("offload_optimizer", "offload_param")


def deepspeed_config(
    options: Mapping[str, Any], *, zero_stage: int, dtype: torch.dtype, max_grad_norm: float
) -> dict[str, Any]:
    """Merge options of a run file into the configuration that this project gives DeepSpeed.

    Args:
        options: part of DeepSpeed's configuration, for example
            ``{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}``.
        zero_stage: ZeRO stage, 1 to 3.
        dtype: dtype of weights and activations, bfloat16 or float32.
        max_grad_norm: norm to which gradients are clipped.

    Raises:
        SettingsError: an option duplicates a setting of the run, or is incompatible with checkpoints by name; the message
            gives the reason.
    """
    zero = dict(options.get("zero_optimization", {}))
    given = {*options, *(f"zero_optimization.{name}" for name in zero)}
    for name in sorted(given & _RESERVED.keys()):
        raise SettingsError(f"deepspeed.{name} cannot be set: {_RESERVED[name]}")
    for name in _OFFLOADS:
        device = zero.get(name, {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise SettingsError(f"deepspeed.zero_optimization.{name}.device={device}: only cpu (or none) is supported")
        if device == "cpu" and name == "offload_param" and zero_stage != 3:
            raise SettingsError(f"deepspeed.zero_optimization.offload_param needs zero_stage=3, but it is {zero_stage}")
    return {
        "train_micro_batch_size_per_gpu": 1,  # without effect: the training plan counts samples
        "gradient_accumulation_steps": 1,  # without effect: the engine sets accumulation boundaries itself
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 2**31,
        **options,
        "zero_optimization": {**zero, "stage": zero_stage},
    }


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """Return whether master weights and moments are in the host's memory."""
    return config["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu"
