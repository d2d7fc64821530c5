"""POPE, MM-Vet, and files in LLaVA's forms: samples with conversations, question.jsonl and NLVR's statements."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from meteor.data.records import UnreadableRecord, read_records
from meteor.data.samples import SampleProblem, UniqueIds, failed, load_samples
from meteor.errors import DataError
from meteor.evaluation.benchmarks.folder import Folder, read_json
from meteor.evaluation.benchmarks.prompts import SHORT_ANSWER, Protocol
from meteor.evaluation.questions import LoadedQuestions, Question, ask, last_answer

POPE_CATEGORIES = ("random", "popular", "adversarial")


def load_pope(folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions:
    """Read ``coco_pope_<category>.json``, with one record per line and images of COCO's val2014."""
    questions = []
    for category in POPE_CATEGORIES:
        name = f"coco_pope_{category}.json"
        records = list(folder.json_lines(name, f"coco/{name}", f"output/coco/{name}"))
        place = folder.image_folder("val2014", embedded=[record["image"] for record in records])
        questions += [
            ask(
                # The ids of every category begin at 1.
                f"{category}/{record['question_id']}",
                protocol.prompt(record["text"], SHORT_ANSWER),
                [f"{place}{record['image']}"],
                [_pope_label(record)],
                type=category,
            )
            for record in records
        ]
    return LoadedQuestions(questions)


def _pope_label(record: Mapping[str, Any]) -> str:
    if record["label"] not in ("yes", "no"):
        raise ValueError(f"the label of question {record['question_id']} is {record['label']!r}, neither yes nor no")
    return record["label"]


def load_mmvet(folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions:
    """Read ``mm-vet.json`` with images in ``images/``."""
    records = folder.json("mm-vet.json")
    place = folder.image_folder("images", embedded=[record["imagename"] for record in records.values()])
    questions = [
        ask(
            question_id,
            record["question"],
            [f"{place}{record['imagename']}"],
            [record["answer"]],
            type="+".join(record.get("capability", ())),
        )
        for question_id, record in records.items()
    ]
    return LoadedQuestions(questions)


def answers_for_judge(folder: Folder, questions: Sequence[Question], answers: Mapping[str, str]) -> tuple[str, Any]:
    """Make the file for MM-Vet's online evaluator."""
    return "for_judge.json", {question.id: answers[question.id] for question in questions}


def read_verdicts(uri: str) -> dict[str, float]:
    """Read a judge's verdicts by question id.

    The file maps ids to numbers, or is MM-Vet's own grade file (id -> {"score": [number, ...]}), whose means count.

    Raises:
        DataError: the file is not JSON, or a verdict is no number or not in [0, 1].
    """
    grades = read_json(uri)
    if not isinstance(grades, dict):
        raise DataError(f"{uri} holds a {type(grades).__name__}, not verdicts by question id: give the judge's file")
    verdicts = {}
    for question_id, content in grades.items():
        scores: Any = content.get("score") if isinstance(content, dict) else content
        try:
            values = [float(score) for score in (scores if isinstance(scores, list) else [scores])]
        except (TypeError, ValueError, OverflowError):
            values = []
        if not values or not all(0 <= value <= 1 for value in values):
            raise DataError(f"{uri}: the verdict on {question_id!r} is {scores!r}, but must be in 0 ... 1")
        verdicts[question_id] = sum(values) / len(values)
    return verdicts


def load_llava(folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions:
    """Read a file of samples with ``conversations``, whose last answers are the references, or a ``question.jsonl``.

    A record of ``question.jsonl`` has ``question_id``, ``image`` and ``text``, and optionally ``category`` and ``answer`` or
    ``label``.
    """
    first: dict[str, Any] = next((record for record in read_records(folder.uri) if isinstance(record, dict)), {})
    if "text" in first and "conversations" not in first:
        return _read_question_file(folder.uri)
    samples, problems = load_samples(folder.uri)
    questions = [Question(sample.id, sample, (last_answer(sample.turns),)) for sample in samples]
    return LoadedQuestions(questions, problems=tuple(problems))


def _read_question_file(uri: str) -> LoadedQuestions:
    questions, problems, ids = [], [], UniqueIds()
    for position, record in enumerate(read_records(uri)):
        try:
            found = _read_question(record, position)
            if isinstance(found, Question):
                # LLaVA's file for TextVQA names several questions by the id of their image.
                found = replace(found, id=ids.take(found.id), stated_id=found.id)
        except Exception as error:  # noqa: BLE001  (a record may hold anything, and must not cost the others)
            found = failed(str(position), error)
        if isinstance(found, Question):
            questions.append(found)
        else:
            problems.append(found)
    return LoadedQuestions(questions, problems=tuple(problems))


def _read_question(record: Any, position: int) -> Question | SampleProblem:
    if isinstance(record, UnreadableRecord):
        return SampleProblem(str(position), "bad_record", record.message)
    if not isinstance(record, dict) or not isinstance(record.get("text"), str) or "question_id" not in record:
        held = sorted(record) if isinstance(record, dict) else type(record).__name__
        message = f"a record of a question file needs question_id and a text, but has {held}"
        return SampleProblem(str(position), "bad_record", message)
    images, answer = record.get("image") or [], record.get("answer", record.get("label"))
    return ask(
        str(record["question_id"]),
        record["text"].replace("<image>", ""),
        images if isinstance(images, list) else [images],
        [] if answer is None else [str(answer)],
        type=str(record.get("category") or ""),
    )


def answers_of_llava(folder: Folder, questions: Sequence[Question], answers: Mapping[str, str]) -> tuple[str, Any]:
    """Make the answers file of LLaVA's own evaluation scripts, with one record per line."""
    rows = [
        {
            "question_id": _number(question.stated_id or question.id),
            "prompt": question.text,
            "text": answers[question.id],
        }
        for question in questions
    ]
    return "answers.jsonl", rows


# LLaVA's own question files have numbers as ids, and its scripts match answers by these.
def _number(question_id: str) -> int | str:
    return int(question_id) if question_id.isdecimal() else question_id


def load_nlvr(folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions:
    """Read statements to be judged true or false, in LLaVA's form.

    The data are a file, or a folder with ``nlvr_llava.json`` and ``images/``.
    """
    if folder.is_file:
        return load_llava(folder, split=split, protocol=protocol)
    loaded = load_llava(Folder(folder.find("nlvr_llava.json"), "NLVR", ""), split=split, protocol=protocol)
    placed = [
        replace(
            question,
            sample=replace(question.sample, images=tuple(f"images/{name}" for name in question.sample.images)),
        )
        for question in loaded.questions
    ]
    return replace(loaded, questions=placed)
