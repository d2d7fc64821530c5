"""DocVQA and InfoVQA (scored by ANLS), ChartQA (by relaxed accuracy) and GQA (by exact match)."""

from collections.abc import Mapping, Sequence
from typing import Any

from meteor.evaluation.benchmarks.folder import Folder
from meteor.evaluation.benchmarks.prompts import SHORT_ANSWER, Protocol
from meteor.evaluation.questions import LoadedQuestions, ask


def load_docvqa(folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions:
    """Read task 1 from ``<split>_v1.0[_withQT].json`` with images in ``documents/`` or ``spdocvqa_images/``."""
    records = folder.json(*_with_subfolders("spdocvqa_qas", f"{split}_v1.0_withQT.json", f"{split}_v1.0.json"))["data"]
    names = [record["image"].rpartition("/")[2] for record in records]
    place = folder.image_folder("documents", "spdocvqa_images", f"{split}/documents", embedded=names)
    return _about_pages(records, [f"{place}{name}" for name in names], protocol, type_key="question_types")


def load_infovqa(folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions:
    """Read ``infographicsVQA_<split>_v1.0[_withQT].json`` with images in ``infographicsvqa_images/``."""
    stem = f"infographicsVQA_{split}_v1.0"
    records = folder.json(*_with_subfolders("infographicsvqa_qas", f"{stem}_withQT.json", f"{stem}.json"))["data"]
    names = [record["image_local_name"] for record in records]
    place = folder.image_folder("infographicsvqa_images", "images", embedded=names)
    return _about_pages(records, [f"{place}{name}" for name in names], protocol, type_key="answer_type")


def _about_pages(
    records: Sequence[Mapping[str, Any]], images: Sequence[str], protocol: Protocol, *, type_key: str
) -> LoadedQuestions:
    """Make a question about one image from each record; if a record has several types, the first counts."""
    return LoadedQuestions(
        [
            ask(
                str(record["questionId"]),
                protocol.prompt(record["question"], SHORT_ANSWER),
                [image],
                record.get("answers", ()),
                type=next(iter(record.get(type_key, ())), ""),
            )
            for record, image in zip(records, images, strict=True)
        ]
    )


def load_chartqa(folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions:
    """Read ``<split>/<split>_human.json`` and ``<split>/<split>_augmented.json`` with images in ``<split>/png/``."""
    questions = []
    for half in ("human", "augmented"):
        records = folder.json(*_with_subfolders("ChartQA Dataset", f"{split}/{split}_{half}.json"))
        names = [record["imgname"] for record in records]
        place = folder.image_folder(f"{split}/png", f"ChartQA Dataset/{split}/png", embedded=names)
        questions += [
            ask(
                f"{half}/{i}",
                protocol.prompt(record["query"], SHORT_ANSWER),
                [f"{place}{record['imgname']}"],
                [str(record["label"])],
                type=half,
            )
            for i, record in enumerate(records)
        ]
    return LoadedQuestions(questions)


def load_gqa(folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions:
    """Read ``<split>_questions.json`` of questions1.2.zip with images in ``images/``."""
    records = folder.json(*_with_subfolders("questions1.2", f"{split}_questions.json"))
    place = folder.image_folder("images", embedded=[f"{record['imageId']}.jpg" for record in records.values()])
    questions = [
        ask(
            question_id,
            protocol.prompt(record["question"], SHORT_ANSWER),
            [f"{place}{record['imageId']}.jpg"],
            [record["answer"]] if "answer" in record else (),
            type=record.get("types", {}).get("structural", ""),
        )
        for question_id, record in records.items()
    ]
    return LoadedQuestions(questions)


def _with_subfolders(subfolder: str, *names: str) -> list[str]:
    """Return the names for files unpacked beside the images, then for files in the archive's own folder."""
    return [*names, *(f"{subfolder}/{name}" for name in names)]
