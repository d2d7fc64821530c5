"""Importance rows: attention over the patches of sub-images, averaged over heads, in float32.

Letters: N sub-images, T tokens of all sub-images, L tokens per sub-image, P patches, C vision width, H heads, Q head width.
"""

import torch

from meteor.errors import SettingsError
from meteor.vision.runs import Run
from meteor.vision.towers import Importance, Tower
from meteor.vision.towers.protocol import PoolingHead


def choose_importance(tower: Tower, wanted: Importance | None) -> Importance:
    """Return the kind of importance row to read: the tower's own unless another is wanted.

    Raises:
        SettingsError: the tower lacks the row.
    """
    chosen = wanted or tower.default_importance
    if chosen == "class_token" and not tower.has_class_token:
        raise SettingsError(
            f"vision.importance={chosen}: a {tower.model.config.model_type} encoder has no class token; set vision.importance "
            "to pooling_query or attention_received"
        )
    if chosen == "pooling_query" and tower.pooling_head() is None:
        raise SettingsError(
            f"vision.importance={chosen}: this {tower.model.config.model_type} encoder has no pooling head; set "
            f"vision.importance to {'class_token' if tower.has_class_token else 'attention_received'}"
        )
    return chosen


def class_token_row(run: Run, q_TC: torch.Tensor, k_TC: torch.Tensor, num_heads: int, num_prefix: int) -> torch.Tensor:
    """Return the class token's attention to patches, softmax(q k^T / sqrt(Q)), mean over heads, (N, P).

    The class token's attention to itself and to registers is left out, so that a row sums to less than 1.
    """
    q_NHQ = run.heads(q_TC, num_heads)[:, :, 0].float()
    return _attention(q_NHQ, run.heads(k_TC, num_heads))[:, :, num_prefix:].mean(dim=1)


def received_row(run: Run, q_TC: torch.Tensor, k_TC: torch.Tensor, num_heads: int, num_prefix: int) -> torch.Tensor:
    """Return the mean attention that each patch receives from all patches, its own included, mean over heads, (N, P).

    Class token and registers take part in the softmax, but neither as readers nor in the row. A row sums to 1 without them.
    """
    q_NHLQ, k_NHLQ = run.heads(q_TC, num_heads), run.heads(k_TC, num_heads)
    # One sub-image at a time, because its maps have H * P * L values.
    rows = [_received(q_HLQ[:, num_prefix:], k_HLQ) for q_HLQ, k_HLQ in zip(q_NHLQ, k_NHLQ, strict=True)]
    return torch.stack(rows)[:, num_prefix:]


def pooling_row(run: Run, final_TC: torch.Tensor, head: PoolingHead) -> torch.Tensor:
    """Return the attention of the pooling head's query to patches, mean over heads, (N, P); a row sums to 1.

    Args:
        run: sub-images of one shape, without prefix tokens.
        final_TC: normed output of the last block.
        head: the tower's pooling head.
    """
    attention = head.attention
    weight_q, weight_k, _ = attention.in_proj_weight.chunk(3)
    bias_q, bias_k, _ = attention.in_proj_bias.chunk(3)
    query_1C = torch.nn.functional.linear(head.query[0], weight_q, bias_q)
    k_TC = torch.nn.functional.linear(final_TC, weight_k, bias_k)
    q_NHQ = query_1C.unflatten(-1, (attention.num_heads, -1)).expand(run.num, -1, -1).float()
    return _attention(q_NHQ, run.heads(k_TC, attention.num_heads)).mean(dim=1)


def _attention(q_NHQ: torch.Tensor, k_NHLQ: torch.Tensor) -> torch.Tensor:
    """Return the attention of one query per head, (N, H, L)."""
    scores_NHL = (k_NHLQ.float() @ q_NHQ[..., None]).squeeze(-1) * q_NHQ.shape[-1] ** -0.5
    return scores_NHL.softmax(dim=-1)


def _received(q_HPQ: torch.Tensor, k_HLQ: torch.Tensor) -> torch.Tensor:
    scores_HPL = (q_HPQ.float() @ k_HLQ.float().mT).mul_(q_HPQ.shape[-1] ** -0.5)
    return scores_HPL.softmax(dim=-1).mean(dim=(0, 1))
