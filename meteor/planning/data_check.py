"""Checks annotation files and their images before hours are spent on them (`meteor data check`)."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow.compute as pc

from meteor.data.inspect_image import InspectedImage, inspect_image
from meteor.data.sample_sets import SampleSet
from meteor.data.samples import SampleProblem
from meteor.data.sources import find_source
from meteor.errors import TokenisationError
from meteor.image.pixels import PixelSettings
from meteor.image.slicing import SlicePlan
from meteor.planning.data_report import DataReport, SetReport, SourceReport

# Images handed to the threads at a time: a future for each of 400,000 would take half a gigabyte.
_IMAGES_AT_A_TIME = 4096

TokenCounter = Callable[[int, Sequence[SlicePlan]], int]


@dataclass(frozen=True)
class CheckedSet:
    """An annotation file as a stage would use it.

    Attributes:
        samples: the file's samples, with its unusable records.
        max_length: tokens of a sample above which its text is cut.
        count_tokens: (position of a sample, slice plans of its images in order) -> tokens, those of its images included.
    """

    samples: SampleSet
    max_length: int
    count_tokens: TokenCounter


def check_data(
    sets: Mapping[str, CheckedSet],
    *,
    roots: Mapping[str, str],
    pixels: PixelSettings,
    full: bool = False,
    num_threads: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Look at every sample and, once each, at every image.

    Args:
        sets: name -> samples and the limits of their stage.
        roots: prefix of an image name -> folder or s3:// URI.
        pixels: slicing, and which images are refused.
        full: read and decode whole images, which finds truncated ones and duplicates; by default headers alone.
        num_threads: images read at the same time.
        on_progress: called with (images done, images in all).

    Returns:
        The report; nothing that is wrong with samples or images raises.
    """
    names = list(
        dict.fromkeys(name for checked in sets.values() for name in checked.samples.distinct_images.to_pylist())
    )
    inspected: dict[str, InspectedImage] = {}
    with warnings.catch_warnings():
        # Pillow warns of what it repairs or skips, for each image; what counts comes out as a reason.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for one in _inspect(names, roots, pixels, full, num_threads):
            inspected[one.name] = one
            if on_progress is not None:
                on_progress(len(inspected), len(names))
    reports = tuple(_check_set(name, one, inspected) for name, one in sets.items())
    return DataReport(reports, _duplicates(inspected.values()) if full else None)


def _inspect(
    names: Sequence[str], roots: Mapping[str, str], pixels: PixelSettings, full: bool, num_threads: int
) -> Iterator[InspectedImage]:
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(names), _IMAGES_AT_A_TIME):
            some = names[start : start + _IMAGES_AT_A_TIME]
            yield from pool.map(lambda name: inspect_image(name, roots, pixels, full=full), some)


def _check_set(name: str, checked: CheckedSet, inspected: Mapping[str, InspectedImage]) -> SetReport:
    samples, problems, max_length = checked.samples, checked.samples.problems, checked.max_length
    token_counts: dict[str, int] = {}
    found = list(problems)
    num_without_images = 0
    rows = zip(samples.ids.to_pylist(), samples.images.to_pylist(), strict=True)
    for position, (sample_id, images) in enumerate(rows):
        plans = [plan for image in images if (plan := inspected[image].plan) is not None]
        if len(plans) < len(images):
            num_without_images += 1
            continue
        try:
            token_counts[sample_id] = checked.count_tokens(position, plans)
        except TokenisationError as error:
            found.append(SampleProblem(sample_id, "tokenisation", str(error)))
    own = [inspected[image] for image in samples.distinct_images.to_pylist()]
    return SetReport(
        name=name,
        num_samples=len(samples) + len(problems),
        num_text_only=pc.sum(pc.equal(samples.images.value_lengths(), 0)).as_py() or 0,
        num_without_images=num_without_images,
        problems=tuple(found),
        sources=_by_source(own),
        max_length=max_length,
        over_long=tuple(sample_id for sample_id, count in token_counts.items() if count > max_length),
        sub_images=dict(sorted(Counter(p.plan.num_sub_images for p in own if p.plan is not None).items())),
        tokens=dict(sorted(Counter(_bucket(count) for count in token_counts.values()).items())),
    )


def _by_source(inspected: Sequence[InspectedImage]) -> tuple[SourceReport, ...]:
    groups: dict[str, list[InspectedImage]] = defaultdict(list)
    for one in inspected:
        groups[find_source(one.name).name].append(one)
    return tuple(
        SourceReport(
            source=find_source(group[0].name),
            num_images=len(group),
            bad=tuple(one for one in group if one.reason),
        )
        for _, group in sorted(groups.items())
    )


def _bucket(num_tokens: int) -> int:
    """The smallest power of two that is not below the number."""
    return 1 << max(num_tokens - 1, 0).bit_length()


def _duplicates(inspected: Iterable[InspectedImage]) -> tuple[tuple[str, ...], ...]:
    groups: dict[str, list[str]] = defaultdict(list)
    for one in inspected:
        if one.sha256:
            groups[one.sha256].append(one.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)
