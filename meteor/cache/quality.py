"""What storing costs: how far the features that a reader gets are from those that the encoder gave.

Letters: P patches of a sub-image, N patches of all sub-images, C vision width, A attention layers, S sub-images.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn.utils.rnn import pad_sequence

from meteor.cache.codec import ROWS_AT_ONCE

# As many patches of a sub-image as the projector `meteor` keeps unless told otherwise.
NUM_TOP_PATCHES = 144


@dataclass(frozen=True)
class Quality:
    """How well one image was stored; columns of its row. None: not measured, or beyond what float32 can square.

    Attributes:
        relative_error: root of the summed squares of all differences over the root of the features' summed squares.
        min_cosine: the lowest cosine between a patch as it was and as it is read.
        top_k_agreement: share of the patches that the class token attends to most (the visual expert's
            `NUM_TOP_PATCHES` of each sub-image and layer) that are still among them.
    """

    relative_error: float | None
    min_cosine: float | None
    top_k_agreement: float | None


QUALITY_COLUMNS = tuple(field.name for field in fields(Quality))


@dataclass(frozen=True)
class Differences:
    """`Quality` before anybody judged it; what is not finite shows as such."""

    squared_features: float
    squared_errors: float
    min_cosine: float
    top_k_agreement: float

    @property
    def is_finite(self) -> bool:
        """Whether all features were, as they are and as they are read."""
        return math.isfinite(self.squared_features) and math.isfinite(self.squared_errors)

    def quality(self) -> Quality:
        """The values of the row's columns."""
        if self.squared_features:
            relative_error = math.sqrt(self.squared_errors / self.squared_features)
        else:
            relative_error = float(self.squared_errors > 0)
        measured = (relative_error, self.min_cosine, self.top_k_agreement)
        return Quality(*(value if math.isfinite(value) else None for value in measured))


def measure_differences(
    features: Sequence[torch.Tensor],
    read_features: Iterable[torch.Tensor],
    attention: Sequence[torch.Tensor],
    read_attention: Sequence[torch.Tensor],
) -> Differences:
    """Compare what the encoder gave with what a reader gets, on the tensors' device, waiting for it once.

    Args:
        features, read_features: (P, C) for each sub-image.
        attention, read_attention: (A, P) for each sub-image.
    """
    norms = [_norms(feature_PC, read_PC) for feature_PC, read_PC in zip(features, read_features, strict=True)]
    norm_N, read_norm_N, error_N = torch.cat(norms, dim=1)
    squared_N, squared_error_N = norm_N.square(), error_N.square()
    # Of a triangle with these three sides.
    cosine_N = (squared_N + read_norm_N.square() - squared_error_N) / (2 * norm_N * read_norm_N).clamp_min(1e-30)
    cosine_N = torch.where(error_N == 0, 1.0, cosine_N)
    return Differences(
        *torch.stack(
            [
                squared_N.sum(dtype=torch.float64),
                squared_error_N.sum(dtype=torch.float64),
                cosine_N.amin().clamp_max(1.0).double(),
                _top_k_agreement(attention, read_attention).double(),
            ]
        ).tolist()
    )


def summarise_errors(key_table: pa.Table) -> dict[str, Any]:
    """The measured errors of a cache or a build, from the rows of its key index or ledger records.

    Returns:
        ``num_images`` that were measured, ``mean_relative_error``, ``max_relative_error``, ``min_cosine`` and
        ``mean_top_k_agreement``; None where nothing was measured.
    """
    error, cosine, agreement = (key_table[name] for name in QUALITY_COLUMNS)
    return {
        "num_images": len(error) - error.null_count,
        "mean_relative_error": pc.mean(error).as_py(),
        "max_relative_error": pc.max(error).as_py(),
        "min_cosine": pc.min(cosine).as_py(),
        "mean_top_k_agreement": pc.mean(agreement).as_py(),
    }


def _norms(feature_PC: torch.Tensor, read_PC: torch.Tensor) -> torch.Tensor:
    """(3, P): norms of the features, of what is read, and of the difference. Three norms cost less than products."""
    norm = functools.partial(torch.linalg.vector_norm, dim=1, dtype=torch.float32)
    norms = []
    for feature_RC, read_RC in zip(feature_PC.split(ROWS_AT_ONCE), read_PC.split(ROWS_AT_ONCE), strict=True):
        scratch_RC = read_RC.to(torch.float32, copy=True)
        norms.append(torch.stack([norm(feature_RC), norm(scratch_RC), norm(scratch_RC.sub_(feature_RC))]))
    return torch.cat(norms, dim=1)


def _top_k_agreement(attention: Sequence[torch.Tensor], read_attention: Sequence[torch.Tensor]) -> torch.Tensor:
    """0-d, over all sub-images and layers; NaN when no layer was cached."""
    chosen, read_chosen = _top_patches(attention), _top_patches(read_attention)
    return (chosen & read_chosen).sum() / chosen.sum()


def _top_patches(attention: Sequence[torch.Tensor]) -> torch.Tensor:
    """(S, longest P, A) bool: the patches with the most attention; all of a sub-image with no more than those."""
    padded_SPA = pad_sequence([part_AP.T for part_AP in attention], batch_first=True, padding_value=-torch.inf)
    best_SKA = padded_SPA.topk(min(NUM_TOP_PATCHES, padded_SPA.shape[1]), dim=1).indices
    chosen_SPA = torch.zeros_like(padded_SPA, dtype=torch.bool).scatter_(1, best_SKA, True)
    return chosen_SPA & padded_SPA.isfinite()
