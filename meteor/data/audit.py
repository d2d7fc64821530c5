"""Audit of a cache: encode a sample of its images again and compare with what is stored."""

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
    """One image, stored against encoded again. All sub-images together.

    Attributes:
        image_key: of the image.
        max_error: largest absolute difference of a feature value.
        relative_error: root of the squared differences' sum over the root of the squared values' sum.
        min_cosine: smallest cosine between the stored and the fresh features of a patch.
        rank_agreement: Spearman's correlation of the class-token attention over the patches, the smallest of all
            sub-images and layers: 1 where both rank the patches alike.
        problem: why the image could not be compared, "" if it could.
    """

    image_key: str
    max_error: float = 0.0
    relative_error: float = 0.0
    min_cosine: float = 1.0
    rank_agreement: float = 1.0
    problem: str = ""


@dataclass(frozen=True)
class CacheAudit:
    """All images of the sample, and the largest relative error that passes."""

    images: tuple[ImageAudit, ...]
    tolerance: float

    @property
    def failed(self) -> list[ImageAudit]:
        """Images that could not be compared or differ too much."""
        return [one for one in self.images if one.problem or not one.relative_error <= self.tolerance]

    def to_dict(self) -> dict[str, Any]:
        """The audit as JSON values."""
        compared = [one for one in self.images if not one.problem]
        worst = {
            "max_error": max((one.max_error for one in compared), default=None),
            "relative_error": max((one.relative_error for one in compared), default=None),
            "min_cosine": min((one.min_cosine for one in compared), default=None),
            "rank_agreement": min((one.rank_agreement for one in compared), default=None),
        }
        return {
            "num_images": len(self.images),
            "num_compared": len(compared),
            "num_failed": len(self.failed),
            "tolerance": self.tolerance,
            "worst": worst,
            "images": [asdict(one) for one in self.images],
        }

    def to_text(self) -> str:
        """The audit as lines: the worst of each measure, then the images that failed."""
        content = self.to_dict()
        verdict = f"{content['num_failed']} of {len(self.images)} images FAILED" if self.failed else "passed"
        lines = [f"audit of {len(self.images)} images: {verdict} (largest relative error allowed {self.tolerance:g})"]
        for name, value in content["worst"].items():
            lines.append(f"  worst {name.replace('_', ' '):<15} {'-' if value is None else format(value, '.3g')}")
        for one in self.failed[:_NUM_SHOWN]:
            lines.append(f"  {one.image_key}: {one.problem or f'relative error {one.relative_error:.3g}'}")
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
    """Encode a seeded sample of the cache's images again and compare.

    Args:
        cache: the version to look at.
        live: encodes with the cache's own encoder and slicing; who calls has compared the identities.
        uris: image key -> file, for the images whose files are known.
        num_images: how many; all where there are fewer.
        tolerance: largest relative error of an image that passes.
        seed: of the choice.
        on_progress: gets (done, total).

    Raises:
        CacheError: no file of any cached image is known.
    """
    known = [key for key in cache.keys() if key in uris]  # noqa: SIM118  (a cache is no mapping)
    if not known:
        raise CacheError(f"the dataset index names none of the {len(cache)} images of {cache.uri}: give their run file")
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
    """Two encodings of one image, of the same patch grids and attention layers."""
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


def rank_correlation(one_P: torch.Tensor, other_P: torch.Tensor) -> float:
    """Spearman's correlation: 1 for the same order, -1 for the opposite one; 1 where there is one patch.

    Equal values are ranked in the order of the patches.
    """
    if len(one_P) < 2:
        return 1.0
    ranks = [values.double().argsort(stable=True).argsort().double() for values in (one_P, other_P)]
    squares = (ranks[0] - ranks[1]).square().sum()
    count = len(one_P)
    return float(1 - 6 * squares / (count * (count**2 - 1)))
