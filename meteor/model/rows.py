"""Arrangement of a batch's samples in the rows that a language model computes, and of its outputs in the batch's rows.

Letters: B rows of the batch, L sequence, N tokens of all samples without padding, M samples, D LLM width.
"""

from dataclasses import dataclass
from typing import Any

import torch

from meteor.model.attention import VARLEN, Layout, Unpadded


@dataclass(frozen=True)
class Arranged:
    """Arguments of a language model, and where its output has each token.

    Attributes:
        inputs: keyword arguments of the language model.
        tokens: tokens of all samples without padding.
        place_N: index of each of these tokens in the flattened output, (N,) long.
    """

    inputs: dict[str, Any]
    tokens: Unpadded
    place_N: torch.Tensor

    def restore(self, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Put an output of the language model, (rows, length, ...), into the batch's rows (B, L, ...); 0 at padding."""
        return self.tokens.restore(values.flatten(0, 1)[self.place_N][None], shape)


def arrange(config: Any, embeds_BLD: torch.Tensor, layout: Layout, *, keep_rows: bool = False) -> Arranged:
    """Arrange a batch for a language model.

    - Attention `varlen` computes one long row of all samples without padding.
    - Rows of several samples keep their places, and get an explicit block mask.
    - Samples that have a row each begin at its left, without gaps, and the model makes its own masks. This is the way for
      which every causal LM is written, whatever mixes its tokens.

    Args:
        config: configuration of the language model, with its attention.
        embeds_BLD: embeddings, (B, L, D).
        layout: sample and position of each token.
        keep_rows: give the block mask to single samples as well, so that tokens stay at their places.
    """
    tokens = layout.unpadded()
    if config._attn_implementation == VARLEN:
        inputs = {"inputs_embeds": tokens.take(embeds_BLD), "position_ids": tokens.position_1N}
        place_N = torch.arange(len(tokens.kept_N), device=embeds_BLD.device)
        return Arranged(inputs | tokens.attention_arguments(), tokens, place_N)
    if keep_rows or int(layout.sample_BL.max()) > 1:
        mask = layout.mask(config, embeds_BLD.dtype)
        if len(tokens.kept_N) < layout.sample_BL.numel():
            # Some layers, such as Gemma 3n's, have no gradient at zeros, which the embedding of padding often is.
            filler_D = tokens.take(embeds_BLD)[0, -1].detach()
            embeds_BLD = torch.where(layout.sample_BL[..., None] > 0, embeds_BLD, filler_D)
        masked = {"inputs_embeds": embeds_BLD, "attention_mask": mask, "position_ids": layout.position_BL}
        return Arranged(masked, tokens, tokens.kept_N)
    start_M1, length_M1 = tokens.bounds[:-1, None].long(), tokens.bounds.diff()[:, None].long()
    place_L = torch.arange(tokens.longest, device=embeds_BLD.device)
    seen_ML = place_L < length_M1
    # Padding repeats the last token of its sample, for the reason above.
    rows_MLD = tokens.take(embeds_BLD)[0][start_M1 + place_L.minimum(length_M1 - 1)]
    return Arranged(
        {"inputs_embeds": rows_MLD, "attention_mask": seen_ML.long()},
        tokens,
        seen_ML.flatten().nonzero().squeeze(-1),
    )


def close_gaps(
    attended_BL: torch.Tensor, input_ids_BL: torch.Tensor, embeds_BLD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Move the attended tokens of prompts to the right, so that a prompt has no gaps and padding is on its left.

    A mask hides a gap from attention, but not from layers that carry a state from token to token.

    Args:
        attended_BL: mask, (B, L) bool, False at padding and at unused visual slots.
        input_ids_BL: token ids of prompts, (B, L).
        embeds_BLD: embeddings of prompts, (B, L, D).

    Returns:
        The ids (B, longest), the embeddings (B, longest, D) and their mask (B, longest).
    """
    longest = int(attended_BL.sum(dim=1).max())
    order_BK = attended_BL.to(torch.uint8).sort(dim=1, stable=True).indices[:, attended_BL.shape[1] - longest :]
    gathered_BKD = embeds_BLD.gather(1, order_BK.unsqueeze(-1).expand(-1, -1, embeds_BLD.shape[-1]))
    return input_ids_BL.gather(1, order_BK), gathered_BKD, attended_BL.gather(1, order_BK)


def restore_prompts(output: Any, input_ids_BL: torch.Tensor, num_closed: int) -> Any:
    """Undo `close_gaps` in generated sequences: their first ``num_closed`` tokens become the prompts as given.

    Args:
        output: sequences, (B x answers per prompt, num_closed + new tokens), or transformers' output that has them.
        input_ids_BL: token ids of the prompts as given, (B, L).
        num_closed: length of the prompts without gaps.
    """
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    given = input_ids_BL.repeat_interleave(len(sequences) // len(input_ids_BL), dim=0)
    full = torch.cat([given, sequences[:, num_closed:]], dim=1)
    if isinstance(output, torch.Tensor):
        return full
    output.sequences = full
    return output
