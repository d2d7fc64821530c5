"""Findings of a data check, as values for programs and as text for people."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meteor.data.inspect_image import InspectedImage
from meteor.data.samples import SampleProblem
from meteor.data.sources import Source

_NUM_EXAMPLES = 3
_BAR_WIDTH = 40


@dataclass(frozen=True)
class SourceReport:
    """Images of a sample set that come from one source.

    Attributes:
        source: the source.
        num_images: distinct images.
        bad: images that cannot be used.
    """

    source: Source
    num_images: int
    bad: tuple[InspectedImage, ...]

    @property
    def reasons(self) -> dict[str, int]:
        return dict(Counter(image.reason for image in self.bad))

    @property
    def advice(self) -> str:
        """Where to get missing images, and what is known to go wrong with them; "" if none is missing."""
        missing = [image for image in self.bad if image.reason == "missing"]
        if not missing:
            return ""
        advice = [f"{len(missing)} of {self.num_images} images of {self.source.name} are missing."]
        advice += [f"Get them from {self.source.origin}."] if self.source.origin else []
        advice += [f"Known: {self.source.trap}."] if self.source.trap else []
        elsewhere = [image for image in missing if image.found_as]
        if elsewhere:
            advice.append(
                f"{len(elsewhere)} of them exist with another suffix ({elsewhere[0].found_as} instead of "
                f"{elsewhere[0].name}): rename them; the format is read from the content."
            )
        return " ".join(advice)


@dataclass(frozen=True)
class SetReport:
    """Findings in one annotation file.

    Attributes:
        name: name of the sample set.
        num_samples: records of the file, usable or not.
        num_text_only: samples that name no image.
        num_without_images: samples with an image that cannot be used.
        problems: records that cannot be used, whatever their images are.
        sources: images by source.
        max_length: number of tokens above which a sample's text is cut.
        over_long: ids of samples whose text is cut.
        sub_images: number of sub-images -> number of distinct images with this many.
        tokens: power of two -> number of samples with at most this many tokens and more than half as many.
    """

    name: str
    num_samples: int
    num_text_only: int
    num_without_images: int
    problems: tuple[SampleProblem, ...]
    sources: tuple[SourceReport, ...]
    max_length: int
    over_long: tuple[str, ...]
    sub_images: dict[int, int]
    tokens: dict[int, int]

    @property
    def num_usable(self) -> int:
        return self.num_samples - self.num_without_images - len(self.problems)

    @property
    def ok(self) -> bool:
        return self.num_usable == self.num_samples > 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ok": self.ok,
            "num_samples": self.num_samples,
            "num_usable": self.num_usable,
            "num_text_only": self.num_text_only,
            "num_without_images": self.num_without_images,
            "problems": [vars(problem) for problem in self.problems],
            "sources": [
                {
                    "source": source.source.name,
                    "num_images": source.num_images,
                    "bad": source.reasons,
                    "bad_images": [
                        {"name": image.name, "reason": image.reason, "message": image.message} for image in source.bad
                    ],
                    "advice": source.advice,
                }
                for source in self.sources
            ],
            "max_length": self.max_length,
            "over_long": list(self.over_long),
            "sub_images": {str(count): number for count, number in self.sub_images.items()},
            "tokens": {str(bound): number for bound, number in self.tokens.items()},
        }

    def to_text(self) -> str:
        lines = [
            f"{self.name}: {self.num_samples:,} samples ({self.num_text_only:,} without images), "
            f"{self.num_usable:,} can be used",
            *self._problem_lines(),
            *_image_table(self.sources),
            *(f"  {source.advice}" for source in self.sources if source.advice),
            *_histogram("sub-images per image", self.sub_images, "{}"),
            *_histogram("tokens per sample, up to", self.tokens, "{:,}"),
        ]
        if self.over_long:
            lines.append(
                f"  {len(self.over_long):,} samples are longer than {self.max_length:,} tokens and will be cut: "
                f"{_examples(self.over_long)}"
            )
        return "\n".join(lines)

    def _problem_lines(self) -> list[str]:
        lines = problem_lines(self.problems)
        if self.num_without_images:
            lines.append(f"  {self.num_without_images:,} samples lack an image that can be used")
        return lines


@dataclass(frozen=True)
class DataReport:
    """Findings of a data check.

    Attributes:
        sets: one report per annotation file.
        duplicates: groups of names whose files have the same content; None if contents were not read.
    """

    sets: tuple[SetReport, ...]
    duplicates: tuple[tuple[str, ...], ...] | None

    @property
    def ok(self) -> bool:
        """Whether every sample and image can be used, and no set is empty.

        Over-long samples are cut and duplicates are encoded once, so that both are only reported.
        """
        return all(report.ok for report in self.sets)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values that name every sample and image that cannot be used."""
        duplicates = None if self.duplicates is None else [list(names) for names in self.duplicates]
        return {"ok": self.ok, "sets": [report.to_dict() for report in self.sets], "duplicates": duplicates}

    def to_text(self) -> str:
        """Return text for a terminal: counts, and a few examples of each problem."""
        blocks = [report.to_text() for report in self.sets]
        if self.duplicates:
            num_names = sum(map(len, self.duplicates))
            blocks.append(
                f"{num_names:,} names share {len(self.duplicates):,} contents; each content is encoded once: "
                f"{' = '.join(self.duplicates[0][:_NUM_EXAMPLES])}"
            )
        blocks.append("The data can be used as they are." if self.ok else "Some of the data cannot be used.")
        return "\n\n".join(blocks)


def problem_lines(problems: Iterable[SampleProblem]) -> list[str]:
    """Return a line per reason: how many records cannot be used for it, a few of their ids, and one message."""
    by_reason: dict[str, list[SampleProblem]] = {}
    for problem in problems:
        by_reason.setdefault(problem.reason, []).append(problem)
    lines = []
    for reason, found in by_reason.items():
        ids = _examples(problem.sample_id for problem in found)
        lines.append(f"  {reason}: {len(found):,} samples: {ids} ({found[0].message})")
    return lines


def _image_table(sources: Sequence[SourceReport]) -> list[str]:
    if not sources:
        return []
    reasons = sorted({reason for source in sources for reason in source.reasons})
    rows = [["images of", "distinct", *reasons]]
    rows += [
        [source.source.name, f"{source.num_images:,}", *(f"{source.reasons.get(reason, 0):,}" for reason in reasons)]
        for source in sources
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    for source in sources:
        for reason in source.reasons:
            found = [image for image in source.bad if image.reason == reason]
            lines.append(f"  {reason}: {_examples(image.name for image in found)} ({found[0].message})")
    return lines


def _histogram(title: str, counts: Mapping[int, int], label: str) -> list[str]:
    if not counts:
        return []
    longest = max(counts.values())
    labels = [label.format(value) for value in counts]
    width = max(map(len, labels))
    return [f"  {title}"] + [
        f"    {text.rjust(width)}  {'#' * max(1, _BAR_WIDTH * number // longest)} {number:,}"
        for text, number in zip(labels, counts.values(), strict=True)
    ]


def _examples(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _NUM_EXAMPLES
    return ", ".join(names[:_NUM_EXAMPLES]) + (f" and {more:,} more" if more > 0 else "")
