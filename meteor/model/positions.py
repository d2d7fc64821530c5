"""Number of tokens that a language model can place."""

from typing import Any

from transformers import PretrainedConfig

from meteor.errors import TooLongError

_NAMES = ("max_position_embeddings", "max_seq_len")
# Kinds of rotary scaling whose factor is not contained in ``max_position_embeddings``.
_SCALED = ("linear", "dynamic", "yarn")


def num_positions(config: PretrainedConfig) -> int | None:
    """Return the most tokens of a prompt and its answer, or None if the model has no limit, as state-space models.

    Scaled rotary embeddings extend the limit. `linear` and `dynamic` scaling, and `yarn` without an original length, keep
    the number before scaling in ``max_position_embeddings``; Llama 3's scaling and LongRoPE the number after it.

    Args:
        config: configuration of a causal LM.
    """
    text = config.get_text_config()
    names = (text.attribute_map.get(name, name) for name in _NAMES)
    limit = next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)
    if limit is None:
        return None
    factors = [_factor(rope, limit) for rope in _ropes(text)]
    return int(limit * min(factors)) if factors else limit


def check_room(config: PretrainedConfig, longest_prompt: int, longest_answer: int) -> int | None:
    """Check that a prompt and its answer have positions.

    Args:
        config: configuration of the language model.
        longest_prompt, longest_answer: numbers of tokens.

    Returns:
        Number of tokens that an answer may have, or None if the model has no limit.

    Raises:
        TooLongError: prompt and answer need more positions than the language model has.
    """
    limit = num_positions(config)
    if limit is None:
        return None
    if longest_prompt + longest_answer > limit:
        raise TooLongError(
            f"the prompt has {longest_prompt} tokens, and an answer up to {longest_answer}: the language model has {limit} "
            "positions. Show fewer or smaller images, or give fewer visual tokens to each: when evaluating by evaluate.k, "
            "evaluate.sub_images=global or evaluate.long_prompts=global"
        )
    return limit - longest_prompt


def _ropes(text: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the settings of rotary embeddings; a model may have others in each kind of layer."""
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(found, dict):
        return []
    nested = [value for value in found.values() if isinstance(value, dict)]
    return nested or [found]


def _factor(rope: dict[str, Any], limit: int) -> float:
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if rope.get("rope_type", rope.get("type")) not in _SCALED or not factor:
        return 1.0
    # With an original length the limit may be given before or after scaling.
    return max(original * factor / limit, 1.0) if original else float(factor)
