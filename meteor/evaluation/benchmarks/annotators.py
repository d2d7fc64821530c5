"""TextVQA, VQAv2 and VizWiz, with answers of ten annotators per question, scored by VQA accuracy."""

from collections.abc import Mapping, Sequence
from typing import Any

from meteor import storage
from meteor.data.samples import SampleProblem
from meteor.evaluation.benchmarks.folder import Folder
from meteor.evaluation.benchmarks.prompts import SHORT_ANSWER, UNANSWERABLE, Protocol
from meteor.evaluation.questions import LoadedQuestions, Question, ask


def load_textvqa(folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions:
    """Read ``TextVQA_0.5.1_<split>.json`` with images in ``train_images/``.

    With OCR tokens, the prompt contains the tokens of ``TextVQA_Rosetta_OCR_v0.2_<split>.json``, as in LLaVA's own evaluation.
    They raise scores by about ten points.
    """
    records = folder.json(f"TextVQA_0.5.1_{split}.json")["data"]
    tokens: dict[str, list[str]] = {}
    if protocol.ocr:
        found = folder.json(f"TextVQA_Rosetta_OCR_v0.2_{split}.json")["data"]
        tokens = {record["image_id"]: record["ocr_tokens"] for record in found}
    names = [f"{record['image_id']}.jpg" for record in records]
    place = folder.image_folder("train_images", "test_images", embedded=names)
    questions = []
    for record, name in zip(records, names, strict=True):
        text = record["question"]
        if protocol.ocr:
            text += f"\nReference OCR token: {', '.join(tokens.get(record['image_id'], []))}"
        prompt, answers = protocol.prompt(text, SHORT_ANSWER), record.get("answers", ())
        questions.append(ask(str(record["question_id"]), prompt, [f"{place}{name}"], answers))
    return LoadedQuestions(questions)


def load_vqav2(folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions:
    """Read ``v2_OpenEnded_mscoco_*_questions.json`` with images in ``val2014/`` or ``test2015/``.

    The split val also needs ``v2_mscoco_val2014_annotations.json``; the answers of the test splits are not public.
    """
    year = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}[split]
    records = folder.json(f"v2_OpenEnded_mscoco_{year}_questions.json")["questions"]
    known: dict[str, Any] = {}
    if split == "val":
        annotations = folder.json("v2_mscoco_val2014_annotations.json")["annotations"]
        # As text, because copies of the two files spell ids as numbers and as text.
        known = {str(annotation["question_id"]): annotation for annotation in annotations}
    images = "val2014" if split == "val" else "test2015"
    # COCO's file names contain the image's id with twelve digits.
    names = [f"COCO_{images}_{record['image_id']:012d}.jpg" for record in records]
    place = folder.image_folder(images, "", embedded=names)
    questions, problems = [], []
    for record, name in zip(records, names, strict=True):
        question_id = str(record["question_id"])
        annotation = known.get(question_id, {})
        if split == "val" and not annotation.get("answers"):
            # Without answers the question would count for nothing, as those of the test splits do.
            message = "v2_mscoco_val2014_annotations.json has no answers to it"
            problems.append(SampleProblem(question_id, "no_answer", message))
            continue
        questions.append(
            ask(
                question_id,
                protocol.prompt(record["question"], SHORT_ANSWER),
                [f"{place}{name}"],
                [answer["answer"] for answer in annotation.get("answers", ())],
                type=annotation.get("answer_type", ""),
            )
        )
    return LoadedQuestions(questions, problems=tuple(problems))


def submit_vqav2(folder: Folder, questions: Sequence[Question], answers: Mapping[str, str]) -> tuple[str, Any]:
    """Make EvalAI's file, which needs an answer to every question of the test split.

    The split test-dev is a part of test, so the other questions of test get an empty answer.
    """
    whole = "v2_OpenEnded_mscoco_test2015_questions.json"
    ids = [int(question.id) for question in questions]
    if storage.exists(storage.join(folder.uri, whole)):
        known = set(ids)
        records = folder.json(whole)["questions"]
        ids += [record["question_id"] for record in records if record["question_id"] not in known]
    return "submission.json", [{"question_id": id_, "answer": answers.get(str(id_), "")} for id_ in ids]


def load_vizwiz(folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions:
    """Read ``<split>.json`` or ``Annotations/<split>.json`` with images in ``<split>/``."""
    records = folder.json(f"Annotations/{split}.json", f"{split}.json")
    place = folder.image_folder(split, "", embedded=[record["image"] for record in records])
    questions = [
        ask(
            record["image"],
            protocol.prompt(record["question"], UNANSWERABLE, SHORT_ANSWER),
            [f"{place}{record['image']}"],
            [answer["answer"] for answer in record.get("answers", ())],
            type=record.get("answer_type", ""),
        )
        for record in records
    ]
    return LoadedQuestions(questions)


def submit_vizwiz(folder: Folder, questions: Sequence[Question], answers: Mapping[str, str]) -> tuple[str, Any]:
    """Make EvalAI's file."""
    return "submission.json", [{"image": question.id, "answer": answers[question.id]} for question in questions]
