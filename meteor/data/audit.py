"""Audit of a cache: encode a sample of its images again and compare the result with the stored features."""

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from meteor.cache import FeatureCache
from meteor.errors import CacheError, DataError
from meteor.features import ImageFeatures
from meteor.vision.live import LiveFeatures

_NUM_SHOWN = 5


@dataclass(frozen=True)
class ImageAudit:
    """Differences between the stored and the fresh features of an image, over all its sub-images.

    Attributes:
        image_key: the image's key.
        max_error: largest absolute difference of a feature value.
        relative_error: norm of the differences divided by the norm of the fresh values.
        min_cosine: smallest cosine between the stored and the fresh features of a patch.
        rank_agreement: Spearman's correlation between the stored and the fresh class-token attention over the patches,
            the smallest of all sub-images and layers; 1 when both rank the patches alike.
        problem: reason why the image could not be compared, or "".
    """

    image_key: str
    max_error: float = 0.0
    relative_error: float = 0.0
    min_cosine: float = 1.0
    rank_agreement: float = 1.0
    problem: str = ""


@dataclass(frozen=True)
class CacheAudit:
    """Result of an audit.

    Attributes:
        images: comparisons of all images in the sample.
        tolerance: largest relative error that passes.
    """

    images: tuple[ImageAudit, ...]
    tolerance: float

    @property
    def failed(self) -> list[ImageAudit]:
        """Images that could not be compared or differ too much."""
        # Negated, so that a relative error of nan fails too.
        return [image for image in self.images if image.problem or not image.relative_error <= self.tolerance]

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as JSON values."""
        compared = [image for image in self.images if not image.problem]
        worst = {
            "max_error": max((image.max_error for image in compared), default=None),
            "relative_error": max((image.relative_error for image in compared), default=None),
            "min_cosine": min((image.min_cosine for image in compared), default=None),
            "rank_agreement": min((image.rank_agreement for image in compared), default=None),
        }
        return {
            "num_images": len(self.images),
            "num_compared": len(compared),
            "num_failed": len(self.failed),
            "tolerance": self.tolerance,
            "worst": worst,
            "images": [asdict(image) for image in self.images],
        }

    def to_text(self) -> str:
        """Return the audit as lines: the worst value of each measure, then the images that failed."""
        content = self.to_dict()
        verdict = f"{content['num_failed']} of {len(self.images)} images FAILED" if self.failed else "passed"
        lines = [f"audit of {len(self.images)} images: {verdict} (largest relative error allowed {self.tolerance:g})"]
        for name, value in content["worst"].items():
            lines.append(f"  worst {name.replace('_', ' '):<15} {'-' if value is None else format(value, '.3g')}")
        for image in self.failed[:_NUM_SHOWN]:
            lines.append(f"  {image.image_key}: {image.problem or f'relative error {image.relative_error:.3g}'}")
        if len(self.failed) > _NUM_SHOWN:
            lines.append(f"  ... and {len(self.failed) - _NUM_SHOWN} more")
        return "\n".join(lines)


def audit_cache(
    cache: FeatureCache,
    live: LiveFeatures,
    uris: Mapping[str, str],
    *,
    num_images: int,
    tolerance: float,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> CacheAudit:
    """Encode a seeded sample of the cache's images again and compare the features.

    Args:
        cache: the version to audit.
        live: source that encodes with the cache's own encoder and slicing; the caller has compared the identities.
        uris: image key -> URI, for the images whose files are known.
        num_images: size of the sample; all images when there are fewer.
        tolerance: largest relative error with which an image passes.
        seed: number that fixes the choice of images.
        on_progress: called with (images done, images in the sample).

    Raises:
        CacheError: no file of any cached image is known.
    """
    known = [key for key in cache.keys() if key in uris]  # noqa: SIM118  (a cache is no mapping)
    if not known:
        raise CacheError(f"the dataset index names none of the {len(cache)} images of {cache.uri}: give their run file")
    # In the order of keys, which is the order of a cache's index.
    chosen = sorted(random.Random(seed).sample(known, min(num_images, len(known))))
    images = []
    for key in chosen:
        images.append(_audit_image(cache, live, key))
        if on_progress is not None:
            on_progress(len(images), len(chosen))
    return CacheAudit(tuple(images), tolerance)


def _audit_image(cache: FeatureCache, live: LiveFeatures, key: str) -> ImageAudit:
    try:
        stored = cache.get(key)
        fresh = live.get(key).with_attention(stored.attention_layers)
    except (CacheError, DataError) as error:
        return ImageAudit(key, problem=str(error))
    if stored.patch_grids != fresh.patch_grids:
        return ImageAudit(key, problem=f"patch grids {stored.patch_grids} are stored, {fresh.patch_grids} came out")
    return compare_features(stored, fresh)


def compare_features(stored: ImageFeatures, fresh: ImageFeatures) -> ImageAudit:
    """Compare two encodings of an image that have equal patch grids and attention layers."""
    # In float64, so that the comparison adds no rounding error to the differences that it measures.
    stored_PC, fresh_PC = (torch.cat([part.double() for part in image.features]) for image in (stored, fresh))
    difference_PC = stored_PC - fresh_PC
    agreements = [
        rank_correlation(stored_P, fresh_P)
        for stored_AP, fresh_AP in zip(stored.cls_attention, fresh.cls_attention, strict=True)
        for stored_P, fresh_P in zip(stored_AP, fresh_AP, strict=True)
    ]
    return ImageAudit(
        stored.image_key,
        max_error=float(difference_PC.abs().max()),
        relative_error=float(difference_PC.norm() / fresh_PC.norm().clamp_min(torch.finfo(torch.float64).tiny)),
        min_cosine=float(torch.cosine_similarity(stored_PC, fresh_PC, dim=1).min()),
        rank_agreement=min(agreements, default=1.0),
    )


def rank_correlation(stored_P: torch.Tensor, fresh_P: torch.Tensor) -> float:
    """Return Spearman's correlation: 1 for the same order, -1 for the opposite order, and 1 for a single patch.

    Equal values are ranked in the order of the patches.
    """
    if len(stored_P) < 2:
        return 1.0
    # The second argsort turns an order into ranks.
    ranks = [values.double().argsort(stable=True).argsort().double() for values in (stored_P, fresh_P)]
    squares = (ranks[0] - ranks[1]).square().sum()
    count = len(stored_P)
    return float(1 - 6 * squares / (count * (count**2 - 1)))
