"""The question sets of a run, with their files, benchmark and images."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from meteor import storage
from meteor.data.samples import SampleProblem
from meteor.errors import DataError, MeteorError, NotFoundError, SettingsError
from meteor.evaluation.benchmarks import BENCHMARKS, Benchmark, Folder
from meteor.evaluation.benchmarks.others import read_verdicts
from meteor.evaluation.benchmarks.presets import choose_protocol
from meteor.evaluation.metrics import Metric, judged, relaxed
from meteor.evaluation.questions import LoadedQuestions, Question
from meteor.formatting import shorten

_LONGEST_SHOWN = 200


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """The questions of a benchmark with a run's options.

    Attributes:
        name: name of the set in the run.
        format: format of the files, a key of `BENCHMARKS`.
        uri: folder or file.
        benchmark: reading and scoring of the set.
        metric: metric with the set's options.
        questions: questions in the order of the file; images in the set's own folder are named ``@<name>/...``.
        problems: records that cannot be used.
        digest: digest of the questions and the right answers, wherever the files are.
        facts: options on which scores depend besides the model, such as split and OCR.
        image_root: folder for which ``@<name>/`` stands; None if all images are under the run's own roots.
        sources: URI -> etag of the files that were read.
        embedded: function that yields images to be written to ``image_root`` first; None if the images are files already.
        resized: name in ``image_root`` -> name of the image that is resized to it; empty without ``long_side``.
        long_side: longer side of resized images in pixels; None for unchanged images.
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
        """Digest of the questions, the right answers, the options and the metric: everything but the model."""
        content = [self.digest, self.facts, self.metric.name, self.metric.version]
        # Records that cannot be used count as wrong.
        content += [[problem.sample_id for problem in self.problems]] if self.problems else []
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def scored_by(self) -> str:
        """Party that scores the answers: "judge" or "server" if a file is written for it, "" if they are scored here."""
        if self.metric.name == "judge":
            return "" if "verdicts" in self.facts else "judge"
        return "server" if self.facts["split"] in self.benchmark.exported_splits else ""

    @property
    def prefix(self) -> str:
        """First part of the names of images in the set's own folder."""
        return f"@{self.name}/"

    @property
    def folder(self) -> Folder:
        """Files of the set."""
        return Folder(self.uri, self.benchmark.title, self.benchmark.origin)

    @property
    def has_own_images(self) -> bool:
        """Whether images must be written before they can be read; see `meteor.evaluation.question_images`."""
        return self.embedded is not None or bool(self.resized)


def load_question_set(
    name: str,
    *,
    format: str,
    uri: str,
    embedded_root: str,
    split: str | None = None,
    preset: str | None = None,
    ocr: bool | None = None,
    compat: bool = True,
    verdicts: str | None = None,
    long_side: int | Literal["original"] | None = None,
) -> QuestionSet:
    """Read a benchmark's files.

    Args:
        name: name of the set in its run.
        format: key of `BENCHMARKS`.
        uri: folder with the files as published, or a JSON or JSONL file in LLaVA's form.
        embedded_root: folder below which images are written that come inside other files or are resized.
        split: split of the benchmark; None for its default.
        preset: key of `meteor.evaluation.benchmarks.presets.PRESETS`; None for images as they are and no OCR tokens.
        ocr: put OCR tokens into the prompt; None for the preset's choice.
        compat: see `meteor.evaluation.scoring.relaxed_accuracy`.
        verdicts: URI of the judge's file.
        long_side: resize every image to this longer side in pixels, or "original" for none; None for the preset's choice.

    Raises:
        NotFoundError: a file is missing; the message names its source.
        SettingsError: the benchmark lacks this split, or has no OCR tokens.
        DataError: a file is damaged.
    """
    benchmark = BENCHMARKS[format]
    split = benchmark.splits[0] if split is None else split
    if split not in benchmark.splits:
        raise SettingsError(f"{benchmark.title} has no split {split!r} here; known: {', '.join(benchmark.splits)}")
    protocol, changes = choose_protocol(format, preset, ocr=ocr, long_side=long_side)
    if protocol.ocr and not benchmark.has_ocr:
        raise SettingsError(f"{benchmark.title} has no OCR tokens: remove data.evaluate.{name}.ocr")
    folder = _Recorded(uri, benchmark.title, benchmark.origin)
    try:
        loaded = benchmark.load(folder, split=split, protocol=protocol)
        questions, problems = _usable(loaded)
        digest = _digest(questions)
    except NotFoundError:
        # An absent or empty folder is more likely a wrong path than a set of missing files.
        if not folder.is_file and not storage.list_objects(uri):
            raise NotFoundError(
                f"data.evaluate.{name}.path={uri!r} is empty or does not exist: download {benchmark.title} from "
                f"{benchmark.origin}"
            ) from None
        raise
    except MeteorError:
        raise
    # Files of strangers may hold anything; whatever a reader stumbles over, the user needs the file's name.
    except Exception as error:
        read = folder.used[-1] if folder.used else uri
        raise DataError(
            f"data.evaluate.{name}: {read} is not as {benchmark.title} is published ({type(error).__name__}: "
            f"{shorten(' '.join(str(error).split()), _LONGEST_SHOWN)}): download it again from {benchmark.origin}"
        ) from error
    image_root = None if folder.is_file else uri
    if loaded.embedded is not None or protocol.long_side:
        size = f"{protocol.long_side}px" if protocol.long_side else ""
        image_root = storage.join(embedded_root, "-".join(filter(None, [format, digest[:12], size])))
    resized: dict[str, str] = {}
    if image_root is not None:
        if protocol.long_side:
            names = {image for question in questions for image in question.sample.images}
            resized = {f"{_stem(image)}.png": image for image in sorted(names)}
        ending = ".png" if protocol.long_side else ""
        questions = [_placed(question, f"@{name}/", ending=ending) for question in questions]
    return QuestionSet(
        name=name,
        format=format,
        uri=uri,
        benchmark=benchmark,
        metric=_metric(benchmark, format, compat, verdicts),
        questions=questions,
        problems=problems,
        digest=digest,
        facts={"benchmark": format, "split": split, "ocr": protocol.ocr, "long_side": protocol.long_side}
        | ({"preset": preset, "changes": changes} if preset else {})
        | ({"compat": compat} if format == "chartqa" else {})
        | ({"verdicts": hashlib.sha256(storage.read_bytes(verdicts)).hexdigest()} if verdicts else {})
        | ({"note": benchmark.note} if benchmark.note else {}),
        image_root=image_root,
        sources={file: storage.stat(file).etag for file in [*folder.used, *filter(None, [verdicts])]},
        embedded=loaded.embedded,
        resized=resized,
        long_side=protocol.long_side,
    )


# `is_written` compares the record with that of the last run, to see whether the files have changed.
class _Recorded(Folder):
    """A folder that records the files that were read from it."""

    def __init__(self, uri: str, benchmark: str, origin: str) -> None:
        super().__init__(uri, benchmark, origin)
        self.used: list[str] = [uri] if self.is_file else []

    def find(self, *names: str) -> str:
        self.used.append(found := super().find(*names))
        return found

    def parquet_files(self, part: str) -> list[str]:
        self.used += (found := super().parquet_files(part))
        return found


def _usable(loaded: LoadedQuestions) -> tuple[list[Question], tuple[SampleProblem, ...]]:
    """Return the questions that can be asked, and the problems of the others."""
    usable: dict[str, Question] = {}
    problems = list(loaded.problems)
    for question in loaded.questions:
        problem = _problem(question) or ("an earlier question has its id" if question.id in usable else "")
        if problem:
            problems.append(SampleProblem(str(question.id).encode(errors="replace").decode(), "bad_question", problem))
        else:
            usable[question.id] = question
    return list(usable.values()), tuple(problems)


def _problem(question: Question) -> str:
    """Return why a question cannot be asked; "" if it can. Files of strangers may have any value at any place."""
    sample = question.sample
    texts = [question.id, question.group, sample.type, *question.references, *question.choices, *sample.images]
    texts += [sample.system or "", *(turn.text for turn in sample.turns)]
    if odd := [text for text in texts if not isinstance(text, str)]:
        return f"{odd[0]!r} stands where a text should be"
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return "a text contains half of a surrogate pair, which is no character"
    return ""


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
            question.id,
            question.sample.images,
            [[turn.role, turn.text, turn.num_images] for turn in question.sample.turns],
            question.sample.system,
            question.sample.type,
            question.references,
            question.choices,
            question.group,
        ]
        for question in questions
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
