"""MMBench, MMMU and SEED-Bench: multiple-choice questions with options A, B, ..."""

import ast
import base64
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from meteor.data.samples import SampleProblem
from meteor.errors import DataError
from meteor.evaluation.benchmarks.folder import Folder, read_parquet
from meteor.evaluation.benchmarks.prompts import OPTION_LETTER, SHORT_ANSWER, Protocol
from meteor.evaluation.choices import LETTERS, list_options
from meteor.evaluation.questions import LoadedQuestions, Question, ask

# The published file numbers the rotations of question i as i + 1,000,000, i + 2,000,000, ...
_ROTATION = 1_000_000
# Up to this many characters, an image's field is the number of another row that contains the image.
_LONGEST_REFERENCE = 64
# MMMU's tables have the columns image_1 to image_7.
_MMMU_IMAGES = 7


def load_mmbench(folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions:
    """Read ``mmbench_<split>_20230712.tsv`` or ``MMBench_<SPLIT>_EN[_legacy].tsv`` with images in base64.

    Circular evaluation asks each question once per rotation of its options. Rotations in the file are used; they are made
    for a question without any.
    """
    names = [
        f"mmbench_{split}_20230712.tsv",
        f"MMBench_{split.upper()}_EN.tsv",
        f"MMBench_{split.upper()}_EN_legacy.tsv",
    ]
    rows = folder.table(*names)
    num_prompts = Counter(int(row["index"]) % _ROTATION for row in rows)
    questions: list[Question] = []
    problems: list[SampleProblem] = []
    for row in rows:
        index = int(row["index"])
        # An empty option between others shifts the letters of those after it.
        letters = [letter for letter in LETTERS if row.get(letter)]
        options = [row[letter] for letter in letters]
        if row.get("answer") and row["answer"] not in letters:
            problems.append(_without_right_option(str(index), row["answer"], letters))
            continue
        right = letters.index(row["answer"]) if row.get("answer") else None
        # A question with a single prompt has no rotations in the file.
        alone = num_prompts[index % _ROTATION] == 1
        for turn in range(len(options) if alone else 1):
            text = "\n".join(filter(None, [row.get("hint", ""), row["question"]]))
            turned = [*options[turn:], *options[:turn]]
            questions.append(
                ask(
                    str(index + turn * _ROTATION),
                    protocol.prompt(text, list_options(turned), OPTION_LETTER),
                    [_mmbench_image(index % _ROTATION)],
                    # Each rotation moves the right option forward by a place.
                    [] if right is None else [LETTERS[(right - turn) % len(options)]],
                    type=row.get("category", ""),
                    choices=turned,
                    group=str(index % _ROTATION),
                )
            )
    return LoadedQuestions(questions, lambda: _mmbench_images(folder.table(*names)), tuple(problems))


def _without_right_option(id: str, answer: str, letters: Sequence[str]) -> SampleProblem:
    message = f"the right answer {answer!r} is none of its options ({', '.join(letters) or 'there are none'})"
    return SampleProblem(id, "bad_answer", message)


def _mmbench_image(index: int) -> str:
    return f"images/{index}.jpg"


def _mmbench_images(rows: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, bytes]]:
    encoded = {row["index"]: row["image"] for row in rows}
    for index, content in encoded.items():
        if int(index) >= _ROTATION:
            continue
        if len(content) <= _LONGEST_REFERENCE:
            if len(encoded.get(content, "")) <= _LONGEST_REFERENCE:
                raise DataError(f"MMBench's row {index} refers to row {content!r} for its image, but that row has none")
            content = encoded[content]
        yield _mmbench_image(int(index)), _decoded(content)


def _decoded(content: str) -> bytes:
    """Return the bytes of an image in base64; none if it is not, so that the dataset index reports the image."""
    try:
        return base64.b64decode(content)
    except ValueError:
        return b""


def load_mmmu(folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions:
    """Read Parquet files ``<Subject>/<split>-*.parquet`` as published, with several images per question inside.

    Images come before the text, in which "<image 1>" stays as the reference to an image.
    """
    split = {"val": "validation"}.get(split, split)
    files = folder.parquet_files(split)
    columns = ("id", "question", "options", "answer", "question_type", "subfield")
    questions = []
    for uri in files:
        subject = uri.split("/")[-2]
        for row in read_parquet(uri, [*columns, *(f"image_{i}" for i in range(1, _MMMU_IMAGES + 1))]):
            options = _listed(row["options"])
            text = protocol.prompt(row["question"], list_options(options), OPTION_LETTER)
            questions.append(
                ask(
                    row["id"],
                    text if options else protocol.prompt(row["question"], SHORT_ANSWER),
                    [_mmmu_image(row, i) for i in _mmmu_numbers(row)],
                    _listed(row["answer"]) if row["answer"] and row["answer"] != "?" else (),
                    type=subject,
                    choices=options,
                )
            )

    def embedded() -> Iterator[tuple[str, bytes]]:
        for uri in files:
            for row in read_parquet(uri, ["id", *(f"image_{i}" for i in range(1, _MMMU_IMAGES + 1))]):
                for i in _mmmu_numbers(row):
                    encoded = row[f"image_{i}"].get("bytes") if isinstance(row[f"image_{i}"], dict) else None
                    yield _mmmu_image(row, i), encoded if isinstance(encoded, bytes) else b""

    return LoadedQuestions(questions, embedded)


def _mmmu_numbers(row: Mapping[str, Any]) -> list[int]:
    return [i for i in range(1, _MMMU_IMAGES + 1) if row.get(f"image_{i}")]


def _mmmu_image(row: Mapping[str, Any], number: int) -> str:
    return f"images/{row['id']}_{number}.png"


def _listed(text: str) -> list[str]:
    """Read a list that MMMU writes as Python prints it, "['$6', '$7']"; any other text is the only element."""
    if not text.startswith("["):
        return [text] if text else []
    return [str(element) for element in ast.literal_eval(text)]


def load_seed(folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions:
    """Read ``SEED-Bench.json`` with images in ``SEED-Bench-image/``; questions about videos are left out."""
    content = folder.json("SEED-Bench.json")
    names = {number: name for name, number in content.get("question_type", {}).items()}
    records = [record for record in content["questions"] if record.get("data_type", "image") == "image"]
    place = folder.image_folder("SEED-Bench-image", embedded=[record["data_id"] for record in records])
    questions: list[Question] = []
    problems: list[SampleProblem] = []
    for record in records:
        letters = [letter for letter in "ABCD" if record.get(f"choice_{letter.lower()}") is not None]
        options = [str(record[f"choice_{letter.lower()}"]) for letter in letters]
        answer = record.get("answer")
        if answer and answer not in letters:
            problems.append(_without_right_option(str(record["question_id"]), answer, letters))
            continue
        questions.append(
            ask(
                str(record["question_id"]),
                protocol.prompt(record["question"], list_options(options), OPTION_LETTER),
                [f"{place}{record['data_id']}"],
                [LETTERS[letters.index(answer)]] if answer else (),
                type=names.get(record.get("question_type_id"), ""),
                choices=options,
            )
        )
    return LoadedQuestions(questions, problems=tuple(problems))
