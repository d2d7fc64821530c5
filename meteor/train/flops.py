"""Model FLOPs of a step, by the usual count, and what a device can do: together the MFU."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meteor.train.protocol import full_shape

# Dense bfloat16 in TFLOP/s, accumulated in float32, without sparsity, from NVIDIA's data sheets; the first that matches
# counts. A part of a device (MIG) and a laptop's chip have other peaks.
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
    """Peak FLOP/s of a device by its name (`torch.cuda.get_device_name`); None where it is not known."""
    if re.search(r"\b(MIG|Laptop)\b", device_name):
        return None
    found = (peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name))
    peak = next(found, None)
    return None if peak is None else peak * 1e12


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs that a step's samples need, whatever the hardware does besides: padding and recomputed activations count nothing.

    The convention is PaLM's (arXiv 2204.02311, appendix B), which nanoGPT's ``estimate_mfu`` and torchtitan follow: a weight
    costs a token 2 FLOPs forward, 2 for the gradient of its input and 2 for its own, so 6 where it is trained and 4 where it
    is frozen below something trained (stage 1's language model); attention costs 12 x layers x width x length a token.
    Differences, all of which make the number smaller:

    - attention is causal, a token sees half its sample on average, and packed samples do not see each other: 6 x layers x
      width x (the sum of the samples' squared lengths). The three sources count 12;
    - the output layer counts for answer tokens, the only ones whose logits are computed;
    - the embedding is a look-up and counts nothing; vectors (norms, biases) neither, nor the vision encoder;
    - the projector counts 6 x its matrices for each visual token it gives; what it does to patches that it does not keep is
      left out.

    Unused slots of projectors with a token budget count as tokens, and so do tokens that a text-guided sampler drops, in all
    layers. A mixture of experts would count all its experts.

    Attributes:
        per_token: in the language model's layers.
        per_squared_length: of a sample: attention.
        per_answer_token: in the output layer.
        per_visual_token: in the projector.
        peak: of one device, FLOP/s.
    """

    per_token: float
    per_squared_length: float
    per_answer_token: float
    per_visual_token: float
    peak: float

    @classmethod
    def of(cls, model: Any, peak: float) -> "ModelFlops":
        """Of a `MeteorForConditionalGeneration` with its frozen parameters marked; before or after an engine has it."""
        llm = model.language_model
        config, head = llm.config, llm.get_output_embeddings().weight
        elsewhere = {id(head), id(llm.get_input_embeddings().weight)}
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        return cls(
            per_token=sum(_flops(one) for one in llm.parameters() if id(one) not in elsewhere),
            per_squared_length=6.0 * config.num_hidden_layers * width,
            per_answer_token=_flops(head),
            per_visual_token=sum(map(_flops, model.projector.parameters())),
            peak=peak,
        )

    def count(self, lengths: Iterable[int], num_visual_tokens: int, num_answer_tokens: int) -> float:
        """FLOPs forward and backward.

        Args:
            lengths: tokens of each sample, visual ones included.
            num_visual_tokens: of all samples.
            num_answer_tokens: of all samples.
        """
        num_tokens = num_squares = 0
        for length in lengths:
            num_tokens += length
            num_squares += length**2
        return (
            self.per_token * num_tokens
            + self.per_squared_length * num_squares
            + self.per_answer_token * num_answer_tokens
            + self.per_visual_token * num_visual_tokens
        )


def _flops(parameter: nn.Parameter) -> float:
    """Of a matrix, for one token."""
    shape = full_shape(parameter)
    return (6.0 if parameter.requires_grad else 4.0) * torch.Size(shape).numel() if len(shape) > 1 else 0.0
