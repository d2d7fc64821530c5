"""Attention over rows of several samples, in which a token sees only earlier tokens of its own sample.

Libraries try to detect packed rows, and sometimes fail: the logits of a sample then depend on another sample, without any
error. Here the mask, or the lengths of the samples, are always given.

Letters: B rows, L sequence, N tokens of all samples without padding, H heads, d head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PretrainedConfig

from meteor.constants import IGNORE_INDEX
from meteor.errors import SettingsError

VARLEN = "varlen"
IMPLEMENTATIONS = ("eager", "sdpa", VARLEN)


@dataclass(frozen=True)
class Layout:
    """Sample and position of each token in a batch of rows.

    Attributes:
        sample_BL: number of each token's sample within its row, (B, L) long; 0 at padding and at empty visual slots.
        position_BL: position of each token in its sample, (B, L) long.
    """

    sample_BL: torch.Tensor
    position_BL: torch.Tensor

    @classmethod
    def of(cls, sample_BL: torch.Tensor, attended_BL: torch.Tensor) -> "Layout":
        """Compute positions from sample numbers.

        Args:
            sample_BL: number of each token's sample within its row, (B, L) long; 0 at padding.
            attended_BL: mask, (B, L) bool, False at tokens that no token attends to; they take no position.
        """
        starts_BL = torch.ones_like(attended_BL)
        starts_BL[:, 1:] = sample_BL[:, 1:] != sample_BL[:, :-1]
        before_BL = attended_BL.long().cumsum(-1) - attended_BL.long()
        first_BL = torch.where(starts_BL, before_BL, 0).cummax(-1).values
        return cls(sample_BL * attended_BL, before_BL - first_BL)

    def mask(self, config: PretrainedConfig, dtype: torch.dtype) -> torch.Tensor | dict[str, torch.Tensor]:
        """Build the explicit block mask, (B, 1, L, L), bool for ``sdpa``, additive for ``eager``.

        Padding sees padding, because a softmax over nothing would be NaN; no sample sees padding.

        Returns:
            The mask, or a mask for each kind of the model's attention layers if there are several kinds.
        """
        kinds = sorted({kind for kind in getattr(config, "layer_types", None) or () if kind.endswith("attention")})
        if len(kinds) > 1:
            return {kind: self._mask_of(kind, config, dtype) for kind in kinds}
        # A model whose layers are all alike takes a single mask, and may name no kind.
        unnamed = "full_attention" if attention_window(config) is None else "sliding_attention"
        return self._mask_of(kinds[0] if kinds else unnamed, config, dtype)

    def _mask_of(self, kind: str, config: PretrainedConfig, dtype: torch.dtype) -> torch.Tensor:
        seen_BLL = (self.sample_BL[:, :, None] == self.sample_BL[:, None, :]).tril()
        position_BL, window, chunk = (
            self.position_BL,
            attention_window(config),
            getattr(config, "attention_chunk_size", None),
        )
        if kind == "sliding_attention" and window is not None:
            seen_BLL &= position_BL[:, :, None] - position_BL[:, None, :] < window
        if kind == "chunked_attention" and chunk:
            seen_BLL &= position_BL[:, :, None] // chunk == position_BL[:, None, :] // chunk
        # The positions of padding are not those of a sample: each such token sees at least itself.
        mask_B1LL = (seen_BLL | torch.eye(seen_BLL.shape[1], device=seen_BLL.device, dtype=torch.bool)).unsqueeze(1)
        if config._attn_implementation != "eager":
            return mask_B1LL
        return torch.zeros_like(mask_B1LL, dtype=dtype).masked_fill(~mask_B1LL, torch.finfo(dtype).min)

    def unpadded(self) -> "Unpadded":
        return Unpadded.of(self)


@dataclass(frozen=True)
class Unpadded:
    """All samples of a batch in a single row, without padding.

    Attributes:
        kept_N: index of each token in the flattened (B x L) batch, (N,) long.
        position_1N: position of each token in its sample, (1, N) long.
        bounds: index of each sample's first token, then N, (samples + 1,) int32.
        longest: number of tokens of the longest sample.
    """

    kept_N: torch.Tensor
    position_1N: torch.Tensor
    bounds: torch.Tensor
    longest: int

    @classmethod
    def of(cls, layout: Layout) -> "Unpadded":
        sample_M, length = layout.sample_BL.flatten(), layout.sample_BL.shape[1]
        kept_N = sample_M.nonzero().squeeze(-1)
        # Every row numbers its samples from 1, so only row and number together identify a sample.
        _, lengths = torch.unique_consecutive(
            torch.stack([kept_N // length, sample_M[kept_N]]), dim=1, return_counts=True
        )
        bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(kept_N, layout.position_BL.flatten()[kept_N][None], bounds, int(lengths.max()))

    def next_labels(self, labels_BL: torch.Tensor) -> torch.Tensor:
        """Return the label of each token's successor, (N,) long; `IGNORE_INDEX` for the last token of a sample."""
        next_N = F.pad(labels_BL.flatten()[self.kept_N][1:], (0, 1), value=IGNORE_INDEX)
        next_N[self.bounds[1:].long() - 1] = IGNORE_INDEX
        return next_N

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """Remove padding: (B, L, ...) -> (1, N, ...)."""
        return values.flatten(0, 1)[self.kept_N][None]

    def restore(self, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Undo `take`: (1, N, ...) -> (B, L, ...), zero at padding."""
        flat = values.new_zeros(shape[0] * shape[1], *values.shape[2:])
        flat[self.kept_N] = values[0]
        return flat.view(*shape, *values.shape[2:])

    def attention_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments, in transformers' names, that reach the attention of every layer."""
        return {
            "cu_seq_lens_q": self.bounds,
            "cu_seq_lens_k": self.bounds,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


def varlen_attention(
    module: nn.Module,
    query_1HNd: torch.Tensor,
    key_1HNd: torch.Tensor,
    value_1HNd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each sample of one long row; the signature is transformers' interface.

    CUDA uses torch's FlashAttention for samples of different lengths. Other devices make one call per sample, which
    computes no more.

    Returns:
        The attended values, (1, N, H, d), and None instead of the weights.

    Raises:
        SettingsError: the lengths of the samples are missing, as in answering.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise SettingsError(
            f"attention {VARLEN!r} got no lengths of samples: it is for training, and for models that hand the lengths on to "
            f"their layers, as {type(module).__name__} may not: take 'sdpa', which is also the attention to answer with"
        )
    assert dropout == 0.0, "no causal LM of these stages drops attention"
    query_NHd, key_NHd, value_NHd = (x.squeeze(0).transpose(0, 1) for x in (query_1HNd, key_1HNd, value_1HNd))
    grouped = query_NHd.shape[1] != key_NHd.shape[1]
    if query_NHd.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        # FlashAttention's window counts tokens to the left (-1: all) and to the right (0: causal).
        window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
        output_NHd = varlen_attn(
            query_NHd,
            key_NHd,
            value_NHd,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=window,
            enable_gqa=grouped,
        )
        assert isinstance(output_NHd, torch.Tensor), "no auxiliary output was asked for"
        return output_NHd.unsqueeze(0), None
    output_1HNd = _sample_by_sample(query_1HNd, key_1HNd, value_1HNd, cu_seq_lens_q, scaling, grouped, sliding_window)
    # Some models look at the result in another shape, for which it must be contiguous.
    return output_1HNd.transpose(1, 2).contiguous(), None


# Compiled code would be valid for these sample lengths alone, and every batch would compile again.
@torch.compiler.disable
def _sample_by_sample(
    query_1HNd: torch.Tensor,
    key_1HNd: torch.Tensor,
    value_1HNd: torch.Tensor,
    bounds: torch.Tensor,
    scaling: float | None,
    grouped: bool,
    window: int | None,
) -> torch.Tensor:
    lengths = bounds.diff().tolist()

    def attend(q_1Hnd: torch.Tensor, k_1Hnd: torch.Tensor, v_1Hnd: torch.Tensor) -> torch.Tensor:
        length = q_1Hnd.shape[2]
        options: dict[str, Any] = {"is_causal": True}
        if window is not None and length > window:
            seen = torch.ones(length, length, dtype=torch.bool, device=q_1Hnd.device)
            options = {"attn_mask": seen.tril().triu(1 - window)}
        return F.scaled_dot_product_attention(q_1Hnd, k_1Hnd, v_1Hnd, **options, scale=scaling, enable_gqa=grouped)

    parts = [
        attend(q_1Hnd, k_1Hnd, v_1Hnd)
        for q_1Hnd, k_1Hnd, v_1Hnd in zip(
            *(x.split(lengths, dim=2) for x in (query_1HNd, key_1HNd, value_1HNd)), strict=True
        )
    ]
    return torch.cat(parts, dim=2)


def suits_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `varlen` computes this type on this device: FlashAttention does not support float32 on CUDA."""
    return device.type != "cuda" or dtype in (torch.float16, torch.bfloat16)


def check_varlen(device: torch.device, dtype: torch.dtype) -> None:
    """Raise SettingsError if `varlen` cannot compute this type on this device."""
    if not suits_varlen(device, dtype):
        raise SettingsError(f"llm.attention={VARLEN} needs bfloat16 or float16 on CUDA, and llm.dtype is {dtype}")


def attention_window(config: PretrainedConfig) -> int | None:
    """Return the number of tokens that a model's sliding layers see; None without such layers."""
    # Qwen2's configurations name a window even if use_sliding_window switches it off.
    window = getattr(config, "sliding_window", None)
    return window if getattr(config, "use_sliding_window", True) else None


AttentionInterface.register(VARLEN, varlen_attention)
