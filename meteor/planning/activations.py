"""Bytes that a forward pass keeps for its backward pass, counted on torch's meta device: shapes without memory.

Letters: B rows, L sequence, D LLM width, H heads, d head width, C vision width, P patches.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

# Attention implementation of the model -> name of the function below that has its memory, and computes nothing.
_COUNTED = {"varlen": "counted_varlen", "sdpa": "counted_sdpa", "eager": "eager"}


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that the language model keeps for a micro batch.

    Attributes:
        layer: tensors that one decoder layer keeps.
        layer_input: input of one decoder layer; with activation checkpointing it is all that a layer keeps.
        around: embeddings and the last norm.
    """

    layer: int
    layer_input: int
    around: int


def count_layer_bytes(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    rows: int,
    length: int,
    attention: str,
    trained: bool,
    packed: bool = True,
    adapt: Callable[[Any], None] = lambda model: None,
) -> LayerBytes:
    """Count the bytes that autograd saves in a decoder of this shape.

    A decoder with one layer and a decoder with two layers are counted. Their difference is a layer, and the rest lies around
    the layers.

    Args:
        config: configuration of any Hugging Face causal LM.
        dtype: type of weights and activations.
        rows: B, the rows of a micro batch.
        length: L, padding included; `varlen` has no padding, and is counted as one row of B x L tokens.
        attention: one of `meteor.model.attention.IMPLEMENTATIONS`.
        trained: whether the weights are trained; the inputs of frozen weights are not kept.
        packed: whether rows hold several samples, for which the mask is explicit; else the model makes its own.
        adapt: change of the language model before it trains, for example `meteor.train.lora.add_lora`.
    """
    shape = (1, rows * length) if attention == "varlen" else (rows, length)
    one_layer, two_layers = (
        _count(_decoder(config, n, dtype, _COUNTED[attention], trained, adapt), shape, dtype, packed) for n in (1, 2)
    )
    layer = two_layers - one_layer
    mask = {"varlen": 0, "sdpa": 1, "eager": dtype.itemsize}[attention] * rows * length**2
    return LayerBytes(
        layer=layer,
        layer_input=rows * length * config.hidden_size * dtype.itemsize,
        # Putting visual tokens into place copies the embeddings; four copies are assumed.
        around=one_layer - layer + mask + 4 * rows * length * config.hidden_size * dtype.itemsize,
    )


def _decoder(
    config: PretrainedConfig,
    num_layers: int,
    dtype: torch.dtype,
    attention: str,
    trained: bool,
    adapt: Callable[[Any], None],
) -> Any:
    config = copy.deepcopy(config)
    config.num_hidden_layers = num_layers
    # Some configurations compute their kinds of layers, others keep a list.
    if vars(config).get("layer_types"):
        config.layer_types = config.layer_types[:num_layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        model.requires_grad_(trained)
        adapt(model)
    return model.base_model


def _count(decoder: Any, shape: tuple[int, int], dtype: torch.dtype, packed: bool) -> int:
    rows, length = shape
    with torch.device("meta"):
        embeds_BLD = torch.empty(rows, length, decoder.config.hidden_size, dtype=dtype, requires_grad=True)
        mask_B1LL = torch.empty(rows, 1, length, length, dtype=dtype)
        masked: dict[str, Any] = {}
        if packed:
            masked = {"position_ids": torch.empty(rows, length, dtype=torch.long), "attention_mask": mask_B1LL}
    # Parameters, buffers and inputs are counted elsewhere.
    return count_saved_bytes(
        lambda: decoder(inputs_embeds=embeds_BLD, **masked, use_cache=False),
        [*decoder.parameters(), *decoder.buffers(), embeds_BLD, mask_B1LL],
    )


def count_saved_bytes(forward: Callable[[], Any], given: list[torch.Tensor]) -> int:
    """Count the bytes that autograd keeps after ``forward()``: each storage once, without those of ``given`` tensors."""
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        # The storage is held, as a freed one would give its address to the next.
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    for tensor in given:
        storages.pop(tensor.untyped_storage()._cdata, None)
    del output
    return sum(storage.nbytes() for storage in storages.values())


class _Counted(torch.autograd.Function):
    """Memory of fused attention: it keeps query, key, value, mask, output, and a normaliser per query and head."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        rows, heads, length, _ = query.shape
        # The values may be narrower than the keys, as in DeepSeek V3. In memory a token's heads lie together.
        output = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError("only counted")


def _counted_varlen(
    module: nn.Module,
    query_BHLd: torch.Tensor,
    key_BHLd: torch.Tensor,
    value_BHLd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    return _Counted.apply(query_BHLd, key_BHLd, value_BHLd, None).transpose(1, 2).contiguous(), None


def _counted_sdpa(
    module: nn.Module,
    query_BHLd: torch.Tensor,
    key_BHLd: torch.Tensor,
    value_BHLd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Count attention with a mask: shared keys and values are copied to all heads, and each layer makes a float mask."""
    times = query_BHLd.shape[1] // key_BHLd.shape[1]
    key_BHLd, value_BHLd = (shared.repeat_interleave(times, dim=1) for shared in (key_BHLd, value_BHLd))
    mask = None if attention_mask is None else torch.empty_like(attention_mask, dtype=query_BHLd.dtype)
    return _Counted.apply(query_BHLd, key_BHLd, value_BHLd, mask).transpose(1, 2).contiguous(), None


AttentionInterface.register(_COUNTED["varlen"], _counted_varlen)
AttentionInterface.register(_COUNTED["sdpa"], _counted_sdpa)
