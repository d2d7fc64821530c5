"""Loss of answer tokens whose logits (tokens x vocabulary) are computed chunk by chunk and never held as a whole.

Letters: N answer tokens, D LLM width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from meteor.model.language_model import changes_logits

# The fp32 logits of 1,024 tokens and 32,000 words are 131 MB. Those of 16,384 answer tokens would be 2.1 GB, and their
# gradient as much again.
CHUNK_TOKENS = 1024


class AnswerHead(nn.Linear):
    """Output layer of a language model that can also compute the loss.

    The loss is computed by calling the module, not by a function of its weight, because ZeRO-3 gathers a module's weight
    when the module is called.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits or, if labels are given, the summed cross-entropy.

        Args:
            hidden: hidden states, (..., D); (N, D) with labels.
            labels: token ids, (N,) long; None for logits.

        Returns:
            Logits (..., V), or the *sum* of cross-entropies, 0-d float32.
        """
        if labels is None:
            return super().forward(hidden)
        return _AnswerLoss.apply(hidden, self.weight, self.bias, labels)

    @classmethod
    def around(cls, head: nn.Linear) -> "AnswerHead":
        """Wrap an output layer: the new layer shares its parameters."""
        answer_head = cls(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        answer_head.weight, answer_head.bias = head.weight, head.bias
        return answer_head


class _AnswerLoss(torch.autograd.Function):
    """Cross-entropy that computes its gradients in the forward pass, while a chunk's logits are in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
    ) -> torch.Tensor:
        loss = torch.zeros((), device=hidden_ND.device)
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        for start in range(0, hidden_ND.shape[0], CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            logits_nV = F.linear(hidden_ND[chunk], weight_VD, bias_V).float()
            labels_n1 = labels_N[chunk].unsqueeze(-1)
            normaliser_n1 = logits_nV.logsumexp(-1, keepdim=True)
            loss += (normaliser_n1 - logits_nV.gather(-1, labels_n1)).sum()
            if not any(ctx.needs_input_grad):
                continue
            # d loss / d logits = softmax - 1 at the label. Computed in place, so that a single fp32 chunk is alive.
            logits_nV.sub_(normaliser_n1).exp_()
            logits_nV.scatter_add_(-1, labels_n1, torch.full_like(labels_n1, -1.0, dtype=torch.float32))
            slope_nV = logits_nV.to(hidden_ND.dtype)
            if grad_ND is not None:
                grad_ND[chunk] = slope_nV @ weight_VD
            if grad_VD is not None:
                grad_VD += slope_nV.T @ hidden_ND[chunk]
            if grad_V is not None:
                grad_V += logits_nV.sum(0)
        ctx.save_for_backward(grad_ND, grad_VD, grad_V)
        ctx.dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [grad] = grads
        grad_ND, grad_VD, grad_V = ctx.saved_tensors
        return (
            None if grad_ND is None else grad_ND * grad.to(grad_ND.dtype),
            None if grad_VD is None else grad_VD.mul_(grad).to(ctx.dtype),
            None if grad_V is None else grad_V.mul_(grad).to(ctx.dtype),
            None,
        )


def use_answer_head(language_model: Any) -> None:
    """Replace the output layer by an `AnswerHead`, unless the model changes the output layer's logits.

    Gemma caps its logits, Granite and Cohere scale them: their loss needs the model's own forward pass.
    """
    head = language_model.get_output_embeddings()
    if type(head) not in (nn.Linear, AnswerHead) or changes_logits(language_model):
        return
    language_model.set_output_embeddings(head if isinstance(head, AnswerHead) else AnswerHead.around(head))
