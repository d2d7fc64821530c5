"""Model FLOPs of a step by the usual count, and peak FLOP/s of devices; their ratio is the MFU."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meteor.model.flops import attention_width, layer_weights
from meteor.train.protocol import full_shape

# Peak of dense bfloat16 in TFLOP/s, accumulated in float32, without sparsity, from NVIDIA's data sheets. The first matching
# name counts. A part of a device (MIG) and laptop chips have other peaks.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.4,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H800": 989.4,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_flops(device_name: str) -> float | None:
    """Return a device's peak FLOP/s by its name (`torch.cuda.get_device_name`); None for an unknown device."""
    if re.search(r"\b(MIG|Laptop)\b", device_name):
        return None
    found = (peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name))
    peak = next(found, None)
    return None if peak is None else peak * 1e12


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs that a step's samples need; padding and recomputed activations do not count.

    The convention is PaLM's (arXiv 2204.02311, appendix B), which nanoGPT's ``estimate_mfu`` and torchtitan follow. For each
    token, a weight costs 2 FLOPs in the forward pass, 2 for the gradient of its input and 2 for its own gradient. A trained
    weight therefore counts 6, and a frozen weight below a trained part (stage 1's language model) counts 4. Attention costs
    12 x layers x width x length per token. The count here differs in four points, which all make the number smaller:

    - Attention is causal, a token sees half its sample on average, and packed samples do not see each other. The count is
      6 x layers x width x (sum of the samples' squared lengths), where the three sources count 12.
    - The output layer counts for answer tokens only, because only their logits are computed.
    - The embedding is a look-up and counts nothing. Vectors (norms, biases) and the vision encoder count nothing either.
    - The projector counts 6 x its matrices for each visual token; its work on dropped patches is left out.

    Unused slots of projectors with a token budget count as tokens. Tokens that a text-guided sampler drops count in all
    layers. A mixture of experts would count all its experts.

    Attributes:
        per_token: FLOPs per token in the language model's layers.
        per_squared_length: FLOPs of attention per squared length of a sample.
        per_answer_token: FLOPs per answer token in the output layer.
        per_visual_token: FLOPs per visual token in the projector.
        peak: peak FLOP/s of one device.
    """

    per_token: float
    per_squared_length: float
    per_answer_token: float
    per_visual_token: float
    peak: float

    @classmethod
    def of(cls, model: Any, peak: float) -> "ModelFlops":
        """Count the FLOPs of a `MeteorForConditionalGeneration`, before or after an engine has taken it.

        Args:
            model: model with its frozen parameters marked.
            peak: peak FLOP/s of one device.
        """
        llm = model.language_model
        return cls(
            per_token=sum(map(_flops, layer_weights(llm))),
            per_squared_length=6.0 * llm.config.num_hidden_layers * attention_width(llm.config),
            per_answer_token=_flops(llm.get_output_embeddings().weight),
            per_visual_token=sum(map(_flops, model.projector.parameters())),
            peak=peak,
        )

    def count(self, *, num_tokens: int, num_squares: int, num_visual_tokens: int, num_answer_tokens: int) -> float:
        """Return the FLOPs of forward and backward pass.

        Args:
            num_tokens: number of tokens of all samples, visual tokens included.
            num_squares: sum over samples of the squared number of tokens.
            num_visual_tokens: number of visual tokens of all samples.
            num_answer_tokens: number of answer tokens of all samples.
        """
        return (
            self.per_token * num_tokens
            + self.per_squared_length * num_squares
            + self.per_answer_token * num_answer_tokens
            + self.per_visual_token * num_visual_tokens
        )


def _flops(parameter: nn.Parameter) -> float:
    """Return the FLOPs of a matrix for one token; 0 for vectors."""
    shape = full_shape(parameter)
    return (6.0 if parameter.requires_grad else 4.0) * torch.Size(shape).numel() if len(shape) > 1 else 0.0
