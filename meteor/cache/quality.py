"""Errors of storage: differences between the encoder's features and the features that a reader gets.

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

# The projector `meteor` keeps this many patches of a sub-image by default.
NUM_TOP_PATCHES = 144


@dataclass(frozen=True)
class Quality:
    """Errors of an image's stored features; columns of its row. None if not measured, or if squares overflow float32.

    Attributes:
        relative_error: norm of all differences divided by the norm of the features.
        min_cosine: lowest cosine between a patch's features before and after storage.
        top_k_agreement: share of the patches with the most class-token attention (the visual expert's `NUM_TOP_PATCHES` of
            each sub-image and layer) that storage leaves among them.
    """

    relative_error: float | None
    min_cosine: float | None
    top_k_agreement: float | None


QUALITY_COLUMNS = tuple(field.name for field in fields(Quality))


@dataclass(frozen=True)
class Differences:
    """Sums from which `Quality` is computed; they keep values that are not finite.

    Attributes:
        squared_features: sum of the features' squares.
        squared_errors: sum of the differences' squares.
        min_cosine: lowest cosine, see `Quality`.
        top_k_agreement: share of kept patches, see `Quality`.
    """

    squared_features: float
    squared_errors: float
    min_cosine: float
    top_k_agreement: float

    @property
    def is_finite(self) -> bool:
        """Whether all features were finite, before and after storage."""
        return math.isfinite(self.squared_features) and math.isfinite(self.squared_errors)

    def quality(self) -> Quality:
        """Compute the values of the row's columns."""
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
    """Compare the encoder's features with those that a reader gets, on the tensors' device.

    All results come to the CPU in one transfer, so that a GPU is waited for once.

    Args:
        features, read_features: (P, C) for each sub-image.
        attention, read_attention: (A, P) for each sub-image.
    """
    norms = [_norms(feature_PC, read_PC) for feature_PC, read_PC in zip(features, read_features, strict=True)]
    norm_N, read_norm_N, error_N = torch.cat(norms, dim=1)
    squared_N, squared_error_N = norm_N.square(), error_N.square()
    # The law of cosines gives the angle from the three norms.
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
    """Summarise the measured errors of a cache or a build from the rows of its key index or ledger records.

    Returns:
        ``num_images``, the number of measured images, with ``mean_relative_error``, ``max_relative_error``,
        ``min_cosine`` and ``mean_top_k_agreement``, each None if nothing was measured.
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
    """Return the norms (3, P) of the features, of the read features and of their difference.

    Three norms cost less than the products that a cosine needs.
    """
    norm = functools.partial(torch.linalg.vector_norm, dim=1, dtype=torch.float32)
    norms = []
    for feature_RC, read_RC in zip(feature_PC.split(ROWS_AT_ONCE), read_PC.split(ROWS_AT_ONCE), strict=True):
        scratch_RC = read_RC.to(torch.float32, copy=True)
        norms.append(torch.stack([norm(feature_RC), norm(scratch_RC), norm(scratch_RC.sub_(feature_RC))]))
    return torch.cat(norms, dim=1)


def _top_k_agreement(attention: Sequence[torch.Tensor], read_attention: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the agreement over all sub-images and layers as a 0-d tensor; NaN if no layer was cached."""
    chosen, read_chosen = _top_patches(attention), _top_patches(read_attention)
    return (chosen & read_chosen).sum() / chosen.sum()


def _top_patches(attention: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return (S, longest P, A) bool: the patches with the most attention, or all patches of a small sub-image."""
    padded_SPA = pad_sequence([part_AP.T for part_AP in attention], batch_first=True, padding_value=-torch.inf)
    best_SKA = padded_SPA.topk(min(NUM_TOP_PATCHES, padded_SPA.shape[1]), dim=1).indices
    chosen_SPA = torch.zeros_like(padded_SPA, dtype=torch.bool).scatter_(1, best_SKA, True)
    return chosen_SPA & padded_SPA.isfinite()
