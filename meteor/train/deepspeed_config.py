"""DeepSpeed's configuration: what a run file may add to ours, and why it may not change the rest."""

from collections.abc import Mapping
from typing import Any

import torch

from meteor.errors import SettingsError

_SAMPLES = "global_batch_size and micro_batch_size of the stage say it, and our own order planner counts samples"
_RESERVED = {
    "train_batch_size": _SAMPLES,
    "train_micro_batch_size_per_gpu": _SAMPLES,
    "gradient_accumulation_steps": _SAMPLES,
    "gradient_clipping": "max_grad_norm of the stage says it",
    "optimizer": "AdamW with one parameter group and weight decay 0: several groups break ZeRO-3 and state kept by name",
    "scheduler": "lr and warmup_ratio of the stage say it, as a function of the global step, so that a run resumes",
    "bf16": "llm.dtype says it",
    "fp16": "llm.dtype says it",
    "zero_optimization.stage": "zero_stage of the stage says it",
    "zero_optimization.load_from_fp32_weights": "masters come from our own checkpoints",
}
_OFFLOADS = ("offload_optimizer", "offload_param")


def deepspeed_config(
    options: Mapping[str, Any], *, zero_stage: int, dtype: torch.dtype, max_grad_norm: float
) -> dict[str, Any]:
    """Ours with ``options``, a part of DeepSpeed's own configuration, laid over it.

    Args:
        options: for example ``{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}``.
        zero_stage: 1 to 3.
        dtype: of weights and activations, bfloat16 or float32.
        max_grad_norm: clipping.

    Raises:
        SettingsError: an option says what a setting of ours says, or what checkpoints by name do not allow; the message
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
            raise SettingsError(f"deepspeed.zero_optimization.offload_param needs zero_stage=3, and it is {zero_stage}")
    return {
        "train_micro_batch_size_per_gpu": 1,  # samples are counted by our own order planner
        "gradient_accumulation_steps": 1,  # boundaries are set by hand
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 2**31,
        **options,
        "zero_optimization": {**zero, "stage": zero_stage},
    }


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """Whether masters and moments live in the host's memory."""
    return config["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu"
