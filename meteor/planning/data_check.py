"""Check of annotation files and their images before hours are spent on them (`meteor data check`)."""

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
from meteor.image.pixels import PixelSettings
from meteor.image.slicing import SlicePlan
from meteor.planning.data_report import DataReport, SetReport, SourceReport

# Images given to the threads at once: futures for 400,000 images would take half a gigabyte.
_IMAGES_AT_ONCE = 4096

TokenCounter = Callable[[int, Sequence[SlicePlan]], int | SampleProblem]


@dataclass(frozen=True)
class CheckedSet:
    """An annotation file with the limits of the stage that uses it.

    Attributes:
        samples: the file's samples and its unusable records.
        max_length: number of tokens above which a sample's text is cut.
        count_tokens: (position of a sample, slice plans of its images in order) -> number of text and visual tokens, or the
            problem because of which the stage leaves the sample out.
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
    """Check every sample, and every image once.

    Args:
        sets: name -> samples with the limits of their stage.
        roots: prefix of an image name -> folder or s3:// URI.
        pixels: slicing settings, and which images are refused.
        full: whether to decode whole images, which finds truncated files and duplicates; otherwise only headers are read.
        num_threads: images that are read at the same time.
        on_progress: called with (images done, images in all).

    Returns:
        The report. Faults of samples and images are in it, and never raise.
    """
    names = list(
        dict.fromkeys(name for checked in sets.values() for name in checked.samples.distinct_images.to_pylist())
    )
    inspected: dict[str, InspectedImage] = {}
    with warnings.catch_warnings():
        # Pillow warns about everything that it repairs or skips; an image that cannot be used has a reason in the report.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for image in _inspect(names, roots, pixels, full, num_threads):
            inspected[image.name] = image
            if on_progress is not None:
                on_progress(len(inspected), len(names))
    reports = tuple(_check_set(name, checked, inspected) for name, checked in sets.items())
    return DataReport(reports, _duplicates(inspected.values()) if full else None)


def _inspect(
    names: Sequence[str], roots: Mapping[str, str], pixels: PixelSettings, full: bool, num_threads: int
) -> Iterator[InspectedImage]:
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(names), _IMAGES_AT_ONCE):
            some = names[start : start + _IMAGES_AT_ONCE]
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
        counted = checked.count_tokens(position, plans)
        if isinstance(counted, SampleProblem):
            found.append(counted)
        else:
            token_counts[sample_id] = counted
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
    for image in inspected:
        groups[find_source(image.name).name].append(image)
    return tuple(
        SourceReport(
            source=find_source(group[0].name),
            num_images=len(group),
            bad=tuple(image for image in group if image.reason),
        )
        for _, group in sorted(groups.items())
    )


def _bucket(num_tokens: int) -> int:
    """Return the smallest power of two that is at least the number."""
    return 1 << max(num_tokens - 1, 0).bit_length()


def _duplicates(inspected: Iterable[InspectedImage]) -> tuple[tuple[str, ...], ...]:
    groups: dict[str, list[str]] = defaultdict(list)
    for image in inspected:
        if image.sha256:
            groups[image.sha256].append(image.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)
