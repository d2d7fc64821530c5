"""A run's question sets: which files, which benchmark, where their images are."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meteor import storage
from meteor.data.samples import SampleProblem
from meteor.errors import NotFoundError, SettingsError
from meteor.evaluation.benchmarks import BENCHMARKS, Benchmark, Folder
from meteor.evaluation.benchmarks.others import read_verdicts
from meteor.evaluation.metrics import Metric, judged, relaxed
from meteor.evaluation.questions import Question


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """Questions as a run asks them.

    Attributes:
        name: in the run.
        format: of its files, a key of `BENCHMARKS`.
        uri: folder or file.
        benchmark: how it is read and scored.
        metric: with the set's own options.
        questions: in the order of the file; images in the set's own folder are named ``@<name>/...``.
        problems: records that cannot be used.
        digest: of what is asked and of the right answers, wherever the files are.
        facts: what scores depend on besides the model: split, OCR, and the like.
        image_root: what ``@<name>/`` stands for; None where all its images are under the run's own roots.
        sources: files that were read -> etag.
        embedded: gives images that must be written to ``image_root`` first; None where they are files already.
        resized: name in ``image_root`` -> URI-less name of the image that is resized to it; empty without ``long_side``.
        long_side: pixels; None for images as they are.
    """

    name: str
    format: str
    uri: str
    benchmark: Benchmark
    metric: Metric
    questions: list[Question]
    problems: tuple[SampleProblem, ...]
    digest: str
    facts: dict[str, Any]
    image_root: str | None
    sources: dict[str, str]
    embedded: Callable[[], Iterator[tuple[str, bytes]]] | None
    resized: dict[str, str]
    long_side: int | None

    @property
    def scoring_digest(self) -> str:
        """sha256 over the questions, the right answers and how answers are scored."""
        content = [self.digest, self.facts, self.metric.name, self.metric.version]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def prefix(self) -> str:
        """Of the names of images in its own folder."""
        return f"@{self.name}/"

    @property
    def folder(self) -> Folder:
        return Folder(self.uri, self.benchmark.title, self.benchmark.origin)

    @property
    def has_own_images(self) -> bool:
        """Whether they must be written before they can be read; see `meteor.evaluation.question_images`."""
        return self.embedded is not None or bool(self.resized)


def load_question_set(
    name: str,
    *,
    format: str,
    uri: str,
    embedded_root: str,
    split: str | None = None,
    ocr: bool = False,
    compat: bool = True,
    verdicts: str | None = None,
    long_side: int | None = None,
) -> QuestionSet:
    """Read a benchmark's files.

    Args:
        name: of the set in its run.
        format: key of `BENCHMARKS`.
        uri: folder with the files as published, or one LLaVA JSON / JSONL.
        embedded_root: images that come inside other files, or are resized, are written below it.
        split: the benchmark's own default where None.
        ocr: OCR tokens in the prompt.
        compat: see `meteor.evaluation.scoring.relaxed_accuracy`.
        verdicts: the judge's file.
        long_side: every image is resized to it first.

    Raises:
        NotFoundError: a file is missing; with where it is to be had.
        SettingsError: the benchmark has no such split, or no OCR tokens.
        DataError: a file is damaged.
    """
    benchmark = BENCHMARKS[format]
    split = benchmark.splits[0] if split is None else split
    if split not in benchmark.splits:
        raise SettingsError(f"{benchmark.title} has no split {split!r} here; known: {', '.join(benchmark.splits)}")
    if ocr and not benchmark.has_ocr:
        raise SettingsError(f"{benchmark.title} has no OCR tokens: leave data.evaluate.{name}.ocr away")
    folder = _Recorded(uri, benchmark.title, benchmark.origin)
    try:
        loaded = benchmark.load(folder, split=split, ocr=ocr)
    except NotFoundError:
        # A whole folder that is not there is a wrong path more often than a missing file.
        if not folder.is_file and not storage.list_objects(uri):
            raise NotFoundError(
                f"data.evaluate.{name}.path={uri!r} is empty or does not exist: {benchmark.title} is to be had from "
                f"{benchmark.origin}"
            ) from None
        raise
    digest = _digest(loaded.questions)
    image_root = None if folder.is_file else uri
    if loaded.embedded is not None or long_side:
        image_root = storage.join(embedded_root, "-".join(filter(None, [format, digest[:12], str(long_side or "")])))
    resized: dict[str, str] = {}
    questions = loaded.questions
    if image_root is not None:
        if long_side:
            names = {image for question in questions for image in question.sample.images}
            resized = {f"{_stem(image)}.png": image for image in sorted(names)}
        questions = [_placed(question, f"@{name}/", ending=".png" if long_side else "") for question in questions]
    return QuestionSet(
        name=name,
        format=format,
        uri=uri,
        benchmark=benchmark,
        metric=_metric(benchmark, format, compat, verdicts),
        questions=questions,
        problems=loaded.problems,
        digest=digest,
        facts={"benchmark": format, "split": split, "ocr": ocr, "long_side": long_side}
        | ({"compat": compat} if format == "chartqa" else {})
        | ({"verdicts": hashlib.sha256(storage.read_bytes(verdicts)).hexdigest()} if verdicts else {})
        | ({"note": benchmark.note} if benchmark.note else {}),
        image_root=image_root,
        sources={one: storage.stat(one).etag for one in [*folder.used, *filter(None, [verdicts])]},
        embedded=loaded.embedded,
        resized=resized,
        long_side=long_side,
    )


class _Recorded(Folder):
    """A folder that remembers which files were read."""

    def __init__(self, uri: str, benchmark: str, origin: str) -> None:
        super().__init__(uri, benchmark, origin)
        self.used: list[str] = [uri] if self.is_file else []

    def find(self, *names: str) -> str:
        self.used.append(found := super().find(*names))
        return found

    def parquet_files(self, part: str) -> list[str]:
        self.used += (found := super().parquet_files(part))
        return found


def _metric(benchmark: Benchmark, format: str, compat: bool, verdicts: str | None) -> Metric:
    if format == "chartqa":
        return relaxed(compat=compat)
    if format == "mmvet":
        return judged(read_verdicts(verdicts) if verdicts else None)
    return benchmark.metric


def _stem(image: str) -> str:
    return image.replace("://", "/").strip("/")


def _placed(question: Question, prefix: str, *, ending: str) -> Question:
    images = tuple(f"{prefix}{_stem(image) if ending else image}{ending}" for image in question.sample.images)
    return replace(question, sample=replace(question.sample, images=images))


def _digest(questions: Sequence[Question]) -> str:
    content = [
        [
            one.id,
            one.sample.images,
            [[turn.role, turn.text, turn.num_images] for turn in one.sample.turns],
            one.sample.system,
            one.sample.type,
            one.references,
            one.choices,
            one.group,
        ]
        for one in questions
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
