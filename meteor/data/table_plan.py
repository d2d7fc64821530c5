"""Planning of a sample table: the samples that a run trains on, and the length of each.

The arithmetic works on whole columns of samples, token lengths and images, without a Python object per sample.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meteor.constants import GROUPING_TOKENS_PER_SUB_IMAGE
from meteor.data.collate import ImageLayout, VisualTokenBudget, num_image_tokens
from meteor.data.indexed_images import IndexedImages
from meteor.data.sample_sets import SampleSet
from meteor.data.table import SAMPLE_SCHEMA, WHOLE, SampleTable
from meteor.data.token_table import TokenTable
from meteor.errors import BadImageError, DataError
from meteor.image.pixels import PixelSettings


@dataclass(frozen=True)
class Exclusion:
    """A sample that is left out of training, and the reason."""

    sample_id: str
    reason: str
    message: str


@dataclass(frozen=True)
class TablePlan:
    """A sample table and the samples that it leaves out.

    Attributes:
        table: samples to train on.
        excluded: samples that are left out.
        num_cut: number of samples whose text was cut.
    """

    table: SampleTable
    excluded: tuple[Exclusion, ...]
    num_cut: int

    @classmethod
    def mixture(cls, plans: Sequence["TablePlan"], weights: Sequence[float]) -> "TablePlan":
        """Join the plans of several files; see `SampleTable.mixture`."""
        return cls(
            SampleTable.mixture([plan.table for plan in plans], weights),
            tuple(exclusion for plan in plans for exclusion in plan.excluded),
            sum(plan.num_cut for plan in plans),
        )

    def reasons(self) -> dict[str, int]:
        """Count the excluded samples by reason."""
        return dict(Counter(exclusion.reason for exclusion in self.excluded))


def plan_table(
    samples: SampleSet,
    tokens: TokenTable,
    images: IndexedImages,
    *,
    budget: VisualTokenBudget,
    pixels: PixelSettings,
    max_length: int,
    sub_images: str = "all",
) -> TablePlan:
    """Lay out the images of every sample and cut its text to ``max_length``.

    Args:
        samples: samples in the order of the annotation file; their problems become exclusions.
        tokens: token table with one row per sample.
        images: entries of the dataset index.
        budget: patch grids -> number of visual tokens of each sub-image.
        pixels: settings of slicing and of refused aspect ratios.
        max_length: most tokens per sample; only text is cut.
        sub_images: ``global`` counts the global view alone.

    Raises:
        DataError: an image is not in the index.
    """
    assert len(samples) == len(tokens), "a row of tokens for each sample"
    shown = _Shown.of(samples, images, budget, pixels, only_global=sub_images == "global")
    lengths = tokens.lengths
    excluded = shown.excluded(samples, images)
    for row, problem in lengths.problems.items():
        excluded.setdefault(row, ("tokenisation", tokenisation_message(samples.ids[row].as_py(), problem)))
    num_image_tokens = shown.visual_tokens + shown.separators
    # Text tokens that fit beside the images; negative if the images alone are too long.
    max_text_tokens = max_length - num_image_tokens
    used = np.ones(len(samples), np.bool_)
    used[list(excluded)] = False
    is_cut = used & (lengths.num_text_tokens > max_text_tokens)
    # Without any answer token a sample would teach nothing.
    for row in np.flatnonzero(is_cut & (lengths.first_answer >= max_text_tokens)).tolist():
        excluded[row] = "too_long", too_long_message(int(num_image_tokens[row]), max_length)
        used[row] = is_cut[row] = False
    num_answers = lengths.num_answer_tokens.copy()
    for row in np.flatnonzero(is_cut).tolist():
        num_answers[row] = tokens.num_answer_tokens(row, int(max_text_tokens[row]))
    columns = {
        "sample_id": samples.ids,
        "token_row": np.arange(len(samples)),
        "max_text_tokens": np.where(is_cut, max_text_tokens, WHOLE),
        "num_sub_images": shown.projected,
        "num_visual_tokens": shown.visual_tokens,
        "num_text_tokens": np.where(is_cut, np.maximum(max_text_tokens, 0), lengths.num_text_tokens) + shown.separators,
        "num_answer_tokens": num_answers,
        # All text and all sub-images, even if a variant uses fewer, so that all variants of a study get equal batches.
        "grouping_length": lengths.num_text_tokens + GROUPING_TOKENS_PER_SUB_IMAGE * shown.sub_images,
    }
    table = _table(columns, shown, images, used)
    problems = [Exclusion(problem.sample_id, problem.reason, problem.message) for problem in samples.problems]
    found = [Exclusion(samples.ids[row].as_py(), *excluded[row]) for row in sorted(excluded)]
    return TablePlan(SampleTable(table, [tokens]), (*problems, *found), int(is_cut.sum()))


def tokenisation_message(sample_id: str, problem: str) -> str:
    """Return the message about a sample with a problem of its `TokenLengths`."""
    return f"Sample {sample_id!r}{problem}"


def too_long_message(num_image_tokens: int, max_length: int) -> str:
    """Return the message about a sample whose images and question leave no room for an answer."""
    return (
        f"its images take {num_image_tokens} of {max_length} tokens and its question the rest: no room for an answer; "
        "raise max_length or keep fewer visual tokens"
    )


def _table(
    columns: Mapping[str, pa.Array | np.ndarray], shown: "_Shown", images: IndexedImages, used: np.ndarray
) -> pa.Table:
    mask = pa.array(used)
    places = pa.ListArray.from_arrays(pa.array(shown.offsets, pa.int32()), shown.places).filter(mask)
    keys = pa.ListArray.from_arrays(places.offsets, images.keys.take(places.values))
    filtered = {
        name: pc.filter(pa.array(values, SAMPLE_SCHEMA.field(name).type), mask) for name, values in columns.items()
    }
    return pa.table({**filtered, "image_keys": keys}).select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)


@dataclass(frozen=True, eq=False)
class _Shown:
    """The images that samples show: their rows in the index, and sums per sample.

    Attributes:
        names: image names of all samples in order, with repeats.
        places: row of each image in the index, or null.
        offsets: (samples + 1,) int, position of each sample's first image in ``names``, and the number of names.
        is_bad: (images,) bool, whether an image cannot be used.
        refused: (width, height) -> error with which images of this size are refused.
        sub_images: (samples,) int, number of sub-images.
        projected: (samples,) int, number of sub-images with visual tokens.
        visual_tokens: (samples,) int, number of visual tokens.
        separators: (samples,) int, number of separators after slices.
    """

    names: pa.StringArray
    places: pa.Int32Array
    offsets: np.ndarray
    is_bad: np.ndarray
    refused: Mapping[tuple[int, int], BadImageError]
    sub_images: np.ndarray
    projected: np.ndarray
    visual_tokens: np.ndarray
    separators: np.ndarray

    @classmethod
    def of(
        cls,
        samples: SampleSet,
        images: IndexedImages,
        budget: VisualTokenBudget,
        pixels: PixelSettings,
        *,
        only_global: bool,
    ) -> "_Shown":
        names, offsets = samples.images.flatten(), _offsets(samples.images)
        places = pc.index_in(names, value_set=images.names)
        is_good = pc.fill_null(pc.equal(images.reasons.take(places), ""), False).to_numpy(zero_copy_only=False)
        rows = pc.fill_null(places, 0).to_numpy()[is_good]
        # Images have few distinct sizes, so slicing is planned once per size; width and height make one integer.
        sizes, size_of = np.unique(images.widths[rows] << 32 | images.heights[rows], return_inverse=True)
        counts, refused = _count_by_size(sizes, budget, pixels, only_global)
        by_image = np.zeros((len(names), 4), np.int64)
        by_image[is_good] = counts[size_of]
        is_bad = ~is_good
        is_bad[is_good] = (counts[:, 0] == 0)[size_of]
        sums = np.concatenate([np.zeros((1, 4), np.int64), np.cumsum(by_image, axis=0)])
        return cls(names, places, offsets, is_bad, refused, *(sums[offsets[1:]] - sums[offsets[:-1]]).T)

    def excluded(self, samples: SampleSet, images: IndexedImages) -> dict[int, tuple[str, str]]:
        """Map the row of each sample with an unusable image to reason and message for the first of these images.

        Raises:
            DataError: an image is not in the index.
        """
        found: dict[int, tuple[str, str]] = {}
        bad = np.flatnonzero(self.is_bad)
        for image, row in zip(bad.tolist(), _rows_of(bad, self.offsets).tolist(), strict=True):
            if row in found:
                continue
            name, place = self.names[image].as_py(), self.places[image].as_py()
            if place is None:
                raise DataError(
                    f"sample {samples.ids[row].as_py()!r}: image {name!r} is not in the dataset index; run "
                    "cache_features first"
                )
            if reason := images.reasons[place].as_py():
                found[row] = reason, str(BadImageError(reason, f"image {name!r} is quarantined: {reason}"))
            else:
                error = self.refused[int(images.widths[place]), int(images.heights[place])]
                found[row] = error.reason, str(error)
        return found


def _count_by_size(
    sizes: np.ndarray, budget: VisualTokenBudget, pixels: PixelSettings, only_global: bool
) -> tuple[np.ndarray, dict[tuple[int, int], BadImageError]]:
    """Count what an image of each size takes.

    Args:
        sizes: (N,) int, width << 32 | height in pixels.
        budget: patch grids -> number of visual tokens of each sub-image.
        pixels: settings of slicing.
        only_global: count tokens and separators of the global view alone.

    Returns:
        (N, 4) numbers of sub-images, sub-images with tokens, visual tokens and separators, all 0 for a refused size; and
        the errors of the refused sizes.
    """
    counts = np.zeros((len(sizes), 4), np.int64)
    refused: dict[tuple[int, int], BadImageError] = {}
    known: dict[Any, tuple[int, int, int, int]] = {}
    for number, size in enumerate(sizes.tolist()):
        width, height = size >> 32, size & 0xFFFFFFFF
        try:
            plan = pixels.plan(width, height)
        except BadImageError as error:
            refused[width, height] = error
            continue
        key = plan.grid, plan.patch_grids
        if key not in known:
            layout = ImageLayout(*key)
            known[key] = _count(layout, layout.only_global() if only_global else layout, budget)
        counts[number] = known[key]
    return counts, refused


def _count(whole: ImageLayout, used: ImageLayout, budget: VisualTokenBudget) -> tuple[int, int, int, int]:
    tokens = budget(used.patch_grids)
    num_visual = sum(tokens)
    return len(whole.patch_grids), sum(n > 0 for n in tokens), num_visual, num_image_tokens(used, budget) - num_visual


def _offsets(lists: pa.ListArray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy())]).astype(np.int64)


def _rows_of(places: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the number of the list to which each position in the flat values belongs."""
    return np.searchsorted(offsets, places, side="right") - 1
