"""`meteor compare`: comparison of two evaluations, question by question."""

import argparse
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meteor import storage
from meteor.checksums import check_folder
from meteor.cli.options import add_json
from meteor.errors import DamagedError, NotFoundError, SettingsError
from meteor.report import RunResult
from meteor.report.paired import paired_difference, question_scores

_DESCRIPTION = """Compare two evaluations on the questions that both answered. Differences are paired by question, so that the
difficulty of a question cancels out. The 95 % interval is clustered by image; a star marks a difference whose interval excludes
0."""


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "compare", help="compare two evaluations question by question, with intervals", description=_DESCRIPTION
    )
    place = "folder that evaluate prints as `run`, or the predictions.parquet in it; local or s3://"
    parser.add_argument("a", metavar="A", help=f"first evaluation: {place}")
    parser.add_argument("b", metavar="B", help="second evaluation, in the form of A")
    add_json(parser)
    parser.set_defaults(command=_compare)


@dataclass(frozen=True)
class Comparison:
    """Comparison of two evaluations, a and b, on one question set.

    Attributes:
        set: name of the question set.
        a, b: mean scores of the two evaluations on the questions that both answered, 0 to 1.
        difference: b - a.
        low, high: 95 % interval of the difference; None with fewer than two images.
        num_questions: questions that both answered.
        num_images: images of those questions.
        num_better, num_worse: questions on which b scores higher, and lower, than a.
    """

    set: str
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    num_questions: int
    num_images: int
    num_better: int
    num_worse: int

    @property
    def is_clear(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def to_text(self) -> str:
        interval = "no interval, one image" if self.low is None else f"{_points(self.low)} to {_points(self.high)}"
        return (
            f"{self.set}: {100 * self.a:.1f} -> {100 * self.b:.1f}, {_points(self.difference)} ({interval})"
            f"{' *' if self.is_clear else ''}; {self.num_questions:,} questions about {self.num_images:,} images, "
            f"{self.num_better:,} better, {self.num_worse:,} worse"
        )


def _points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f}"


def _compare(arguments: argparse.Namespace) -> int:
    found = compare(arguments.a, arguments.b)
    print(
        json.dumps([vars(comparison) for comparison in found], indent=2)
        if arguments.json
        else "\n".join(comparison.to_text() for comparison in found)
    )
    return 0


def compare(a: str, b: str) -> list[Comparison]:
    """Compare two evaluations on each question set that both have.

    Args:
        a, b: folder or predictions.parquet of the evaluations.

    Raises:
        NotFoundError: there is no evaluation at ``a`` or ``b``.
        SettingsError: the evaluations have no scored question in common.
    """
    rows_a, rows_b = _read(a), _read(b)
    result_a, result_b = (RunResult(name, {}, predictions=rows) for name, rows in (("a", rows_a), ("b", rows_b)))
    found = []
    for name in dict.fromkeys(row["set"] for row in rows_a):
        difference = paired_difference([result_b], [result_a], name)
        if difference is None:
            continue
        scores_a, scores_b = question_scores(rows_a, name), question_scores(rows_b, name)
        common = [key for key in scores_a if key in scores_b]
        low, high = difference.interval or (None, None)
        mean_a, mean_b = (sum(scores[key] for key in common) / len(common) for scores in (scores_a, scores_b))
        found.append(
            Comparison(
                set=name,
                a=mean_a,
                b=mean_b,
                difference=mean_b - mean_a,
                low=low,
                high=high,
                num_questions=difference.num_questions,
                num_images=difference.num_images,
                num_better=sum(scores_b[key] > scores_a[key] for key in common),
                num_worse=sum(scores_b[key] < scores_a[key] for key in common),
            )
        )
    if not found:
        raise SettingsError(
            f"{a} and {b} have no scored question in common: choose evaluations of the same question sets"
        )
    return found


def _read(place: str) -> list[dict[str, Any]]:
    uri = storage.absolute(place if place.endswith(".parquet") else storage.join(place, "predictions.parquet"))
    folder, _, name = uri.rpartition("/")
    try:
        data = storage.read_bytes(uri)
        check_folder(folder, [name])
        return pq.read_table(pa.BufferReader(data)).to_pylist()
    except NotFoundError as error:
        raise NotFoundError(
            f"there is no evaluation at {place}: give the folder that evaluate prints as `run`"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{uri} is no readable Parquet file ({error}): evaluate again") from error
