"""FLOPs of a language model that answers: the prompt's pass, and each token after it."""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class AnswerFlops:
    """FLOPs of a language model's forward pass, by the convention of `meteor.train.flops.ModelFlops`.

    A matrix costs 2 FLOPs per weight and token. Attention is causal: a token costs 4 x layers x width for each token that it
    sees, itself included. The output layer counts once per new token, because the prompt's pass computes the last token's
    logits only. Embeddings, norms, biases and rotary angles count nothing. Tokens that a text-guided sampler drops count in all
    layers.

    Attributes:
        per_token: FLOPs per token in the layers' matrices.
        per_pair: FLOPs of attention per pair of a token and a token that it sees.
        per_new_token: FLOPs of the output layer.
    """

    per_token: int
    per_pair: int
    per_new_token: int

    @classmethod
    def of(cls, llm: Any) -> "AnswerFlops":
        """Count the FLOPs of a causal language model of transformers."""
        return cls(
            per_token=sum(map(_flops, layer_weights(llm))),
            per_pair=4 * llm.config.num_hidden_layers * attention_width(llm.config),
            per_new_token=_flops(llm.get_output_embeddings().weight),
        )

    def prompt(self, num_tokens: int) -> int:
        """Return the FLOPs from the prompt's embeddings to the logits of the first new token."""
        pairs = num_tokens * (num_tokens + 1) // 2
        return self.per_token * num_tokens + self.per_pair * pairs + self.per_new_token

    def later_tokens(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Return the FLOPs of the passes that give tokens 2, 3, ... ``num_tokens`` of the answer."""
        seen = sum(num_prompt_tokens + position for position in range(1, num_tokens))
        return (self.per_token + self.per_new_token) * (num_tokens - 1) + self.per_pair * seen


def layer_weights(llm: Any) -> list[nn.Parameter]:
    """Return the parameters of a language model without those of its embedding and its output layer."""
    elsewhere = {id(llm.get_output_embeddings().weight), id(llm.get_input_embeddings().weight)}
    return [weight for weight in llm.parameters() if id(weight) not in elsewhere]


def attention_width(config: Any) -> int:
    """Return the width of all heads together; some models, for example Gemma, set head_dim apart from the hidden size."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * head_dim)


def _flops(weight: nn.Parameter) -> int:
    return 2 * weight.numel() if weight.dim() > 1 else 0
