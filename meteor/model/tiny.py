"""A tiny random language model with the architecture of a configuration, on which a start can try things in a second.

Everything that decides how tokens see each other is kept: kinds of layers, windows, sinks, caps, scales, experts. Widths and
numbers of layers shrink, and so do windows and caps, which two short samples would otherwise never reach.
"""

import copy
from typing import Any, TypeGuard

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

WIDTH, HEADS, HEAD_WIDTH, WORDS = 32, 4, 8, 64
# A window that samples of a dozen tokens exceed.
WINDOW = 5

# Sizes by the names that transformers' configurations use; a name that a configuration lacks is skipped.
_SIZES: dict[str, int] = {
    "hidden_size": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "embedding_size": WIDTH,
    "vocab_size": WORDS,
    "vocab_size_per_layer_input": WORDS,
    "hidden_size_per_layer_input": 8,
    "head_dim": HEAD_WIDTH,
    "global_head_dim": HEAD_WIDTH,
    "swa_head_dim": HEAD_WIDTH,
    "swa_v_head_dim": HEAD_WIDTH,
    "attention_head_dim": HEAD_WIDTH,
    "kv_channels": HEAD_WIDTH,
    "intermediate_size": 2 * WIDTH,
    "intermediate_size_mlp": 2 * WIDTH,
    "dense_intermediate_size": 2 * WIDTH,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH,
    "moe_shared_expert_intermediate_size": WIDTH,
    "shared_intermediate_size": WIDTH,
    "expert_ffn_hidden_size": WIDTH,
    "ffn_hidden_size": 2 * WIDTH,
    "ffn_dim": 2 * WIDTH,
    "n_inner": 2 * WIDTH,
    "block_ff_dim": 2 * WIDTH,
    "mlp_hidden_size": 2 * WIDTH,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_top_k": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "zero_expert_num": 1,
    # Attention over latent vectors (DeepSeek).
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": HEAD_WIDTH,
    "qk_rope_head_dim": HEAD_WIDTH,
    "qk_head_dim": 2 * HEAD_WIDTH,
    "v_head_dim": HEAD_WIDTH,
    "index_n_heads": 2,
    "index_head_dim": 2 * HEAD_WIDTH,
    "index_topk": 64,
    "attention_rope_dim": HEAD_WIDTH,
    # State-space layers and linear attention; their expansion of the width stays 2.
    "state_size": 4,
    "ssm_state_size": 4,
    "mamba_d_state": 4,
    "mamba_d_ssm": 2 * WIDTH,
    "mamba_d_head": HEAD_WIDTH,
    "mamba_headdim": HEAD_WIDTH,
    "mamba_head_dim": HEAD_WIDTH,
    "mamba_n_heads": 2 * WIDTH // HEAD_WIDTH,
    "mamba_num_heads": 2 * WIDTH // HEAD_WIDTH,
    "n_mamba_heads": 2,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "n_groups": 1,
    "mamba_chunk_size": 4,
    "chunk_size": 4,
    "mamba_dt_rank": 2,
    "time_step_rank": 2,
    "lru_width": WIDTH,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": HEADS,
    "linear_head_dim": HEAD_WIDTH,
    "linear_key_head_dim": HEAD_WIDTH,
    "linear_value_head_dim": HEAD_WIDTH,
    "attention_hidden_size": WIDTH,
    # Positions and windows.
    "rotary_dim": HEAD_WIDTH,
    "max_position_embeddings": 128,
    "n_ctx": 128,
    "sliding_window": WINDOW,
    "attention_window_size": WINDOW,
    "window_size": WINDOW,
    "attention_chunk_size": WINDOW,
}
# Mamba 2 calls its heads as others call those of attention.
_MAMBA_HEADS = 2 * WIDTH // HEAD_WIDTH
_MOST_LAYERS = 24
# A tiny model of any known architecture has fewer; a configuration whose sizes have unknown names has more.
_MOST_PARAMETERS = 20_000_000
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Scores of random weights stay far below the usual cap of 50.
_CAPS = {"attn_logit_softcapping": 1.0}


def tiny_model(config: PretrainedConfig) -> Any:
    """Build a causal LM of the configuration's architecture with a few thousand random weights, in float32 on the CPU.

    Args:
        config: configuration of any causal LM of transformers.

    Returns:
        The model in evaluation mode, with eager attention. The random state of torch is left as it was.

    Raises:
        ValueError: the model would not be tiny, as its sizes have unknown names.
        Exception: whatever transformers raises if the shrunk configuration is not consistent.
    """
    small = tiny_config(config)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(small).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"the shrunk model would have {size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            small, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
        _spread(model)
    return model.eval()


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a configuration with small sizes, and as few layers as show each kind of layer."""
    text = config.get_text_config()
    given = text.to_dict()
    values = copy.deepcopy(given)
    names = {text.attribute_map.get(name, name): size for name, size in _SIZES.items()}
    for name, size in names.items():
        if _is_size(values.get(name)):
            values[name] = size
        elif isinstance(values.get(name), list) and all(map(_is_size, values[name])):
            values[name] = [size] * len(values[name])
    if values.get("num_kv_shared_layers"):
        values["num_kv_shared_layers"] = 0
    values |= {name: token for name, token in _TOKENS.items() if name in values}
    values |= {name: cap for name, cap in _CAPS.items() if values.get(name) is not None}
    values |= _heads(text, values)
    if _is_size(values.get("num_heads")) and _is_size(values.get("state_size")):
        values["num_heads"] = _MAMBA_HEADS
    values |= _layers(text, values)
    _shorten_rope(values, given)
    values.pop("model_type", None)
    # Differences of layers in their sizes vanish, as all sizes shrink.
    for name in ("architectures", "auto_map", "transformers_version", "quantization_config", "per_layer_config"):
        values.pop(name, None)
    return type(text)(**values)


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _heads(text: PretrainedConfig, values: dict[str, Any]) -> dict[str, int]:
    """Return the numbers of heads; keys stay shared by several queries, or by all, if they were."""
    name = text.attribute_map.get("num_attention_heads", "num_attention_heads")
    heads = values.get(name)
    if not _is_size(heads):
        return {}
    found = {name: HEADS}
    for name in ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads", "swa_num_key_value_heads"):
        name = text.attribute_map.get(name, name)
        if _is_size(shared := values.get(name)):
            found[name] = HEADS if shared >= heads else 1 if shared == 1 else 2
    if _is_size(values.get("swa_num_attention_heads")):
        found["swa_num_attention_heads"] = HEADS
    return found


def _layers(text: PretrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Return the number of layers, and shorter lists with one entry per layer."""
    name = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    total = values.get(name) or getattr(text, "num_hidden_layers", None)
    if not _is_size(total):
        return {}
    lists = {key: value for key, value in values.items() if isinstance(value, list | tuple)}
    indices = {key: value for key, value in lists.items() if _is_indices(key, value, total)}
    lists = {key: value for key, value in lists.items() if len(value) == total and key not in indices}
    computed = list(getattr(text, "layer_types", None) or ())
    if "layer_types" not in lists and not indices and len(set(computed)) > 1:
        # The kinds follow from numbers such as a period: the first layers that show all kinds stay.
        kept = list(range(max(map(computed.index, set(computed))) + 1))
    else:
        memberships = [[place in value for place in range(total)] for value in indices.values()]
        kinds = [str(kind) for kind in zip(*lists.values(), *memberships, strict=True)] or [""]
        # A leak may need a second layer.
        kept = sorted(set(map(kinds.index, kinds)) | set(range(min(2, total))))
    if len(kept) > _MOST_LAYERS:
        raise ValueError(f"{len(kept)} layers are needed to show all kinds of layers")
    found: dict[str, Any] = {name: len(kept)} if name in values else {}
    found |= {key: [value[place] for place in kept] for key, value in lists.items()}
    return found | {key: [kept.index(place) for place in value if place in kept] for key, value in indices.items()}


def _is_indices(name: str, value: Any, total: int) -> bool:
    """Return whether a setting lists the indices of some layers."""
    named = any(part in name for part in ("layer", "idx", "indices"))
    return named and all(_is_index(i) and i < total for i in value) and len(set(value)) == len(value) > 0


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shorten_rope(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Shorten the factors of LongRoPE, which have one entry per pair of a head's dimensions."""
    before = given.get("head_dim") or given.get("hidden_size", 1) // given.get("num_attention_heads", 1)

    def shorten(part: Any) -> None:
        if not isinstance(part, dict):
            return
        for name, value in part.items():
            if name in ("long_factor", "short_factor") and isinstance(value, list):
                part[name] = value[: max(len(value) * HEAD_WIDTH // before, 1)]
            shorten(value)

    for name in ("rope_scaling", "rope_parameters"):
        shorten(values.get(name))


@torch.no_grad()
def _spread(model: Any) -> None:
    """Enlarge matrices of the usual small initial values, so that attention is not nearly uniform."""
    for parameter in model.parameters():
        if parameter.ndim >= 2 and 0 < float(parameter.std()) < 0.05:
            parameter *= 0.2 / float(parameter.std())
