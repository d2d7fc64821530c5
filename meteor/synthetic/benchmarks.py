"""Generated questions in the file formats of published benchmarks: to try an evaluation, and as examples of the formats."""

import base64
import io
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from meteor.synthetic.drawing import draw
from meteor.synthetic.publish import publish_folder
from meteor.synthetic.questions import Question, ask
from meteor.synthetic.scenes import Scene, SceneDealer
from meteor.synthetic.streams import random_stream
from meteor.synthetic.vocabulary import COLOURS, SHAPES

# The version is part of the written record: a folder of another version is refused.
BENCHMARKS_VERSION = 1
_NUM_ANNOTATORS = 10
_LETTERS = "ABCD"
_ROTATION = 1_000_000


def write_benchmarks(folder: str | Path, *, num_scenes: int = 8, seed: int = 0) -> Path:
    """Write a folder per benchmark, named after its format, with the published file names and a few questions.

    Args:
        folder: written folder, which appears complete or not at all. A folder with equal arguments is kept.
        num_scenes: number of images per benchmark.
        seed: seed of images and questions.

    Returns:
        The folder.

    Raises:
        AlreadyExistsError: the folder holds something else.
    """
    arguments = {"num_scenes": num_scenes, "seed": seed, "benchmarks_version": BENCHMARKS_VERSION}

    def fill(temporary: Path) -> dict[str, Any]:
        for name, write in _WRITERS.items():
            rng = random_stream(seed, f"benchmark {name}")
            scenes = list(islice(SceneDealer(rng), num_scenes))
            write(temporary / name, scenes, rng)
        return {"benchmarks": sorted(_WRITERS)}

    publish_folder(Path(folder), "benchmarks.json", arguments, fill)
    return Path(folder)


def _questions(scenes: Sequence[Scene], rng: np.random.Generator) -> Iterator[tuple[int, Question]]:
    for i, scene in enumerate(scenes):
        for question in ask(scene, rng):
            yield i, question


def _image(scene: Scene, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    # A low level saves most of the time.
    draw(scene).save(sink, kind, compress_level=1)
    return sink.getvalue()


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else json.dumps(content, indent=1).encode()
    path.write_bytes(data)


def _write_images(folder: Path, scenes: Sequence[Scene], name: Callable[[int], str], kind: str = "JPEG") -> None:
    for i, scene in enumerate(scenes):
        _write(folder / name(i), _image(scene, kind))


def _annotators(answer: str, rng: np.random.Generator) -> list[str]:
    """Generate ten annotators' answers: most agree, and up to four say "unanswerable", as people do."""
    num_others = int(rng.integers(5))
    return [answer] * (_NUM_ANNOTATORS - num_others) + ["unanswerable"] * num_others


def _options(question: Question, rng: np.random.Generator) -> list[str]:
    """List options: the right answer among up to three wrong answers of its type."""
    pool = {"count": ["1", "2", "3", "4", "5"], "colour": list(COLOURS), "shape": list(SHAPES)}.get(question.type)
    others = [answer for answer in pool or ["yes", "no", "None", "nan"] if answer != question.answer]
    picked = [others[i] for i in rng.permutation(len(others))[:3]]
    place = int(rng.integers(len(picked) + 1))
    return [*picked[:place], question.answer, *picked[place:]]


def _textvqa(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    _write_images(folder / "train_images", scenes, lambda i: f"{i:016x}.jpg")
    records = [
        {
            "question_id": 34602 + number,
            "image_id": f"{i:016x}",
            "question": question.text,
            "answers": _annotators(question.answer, rng),
            "set_name": "val",
        }
        for number, (i, question) in enumerate(_questions(scenes, rng))
    ]
    _write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": records})
    tokens = [
        {"image_id": f"{i:016x}", "ocr_tokens": [scene.text.word] if scene.text else []}
        for i, scene in enumerate(scenes)
    ]
    _write(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})


def _vqav2(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    questions = list(_questions(scenes, rng))
    for year, split in (("val2014", "val2014"), ("test2015", "test-dev2015"), ("test2015", "test2015")):
        _write_images(folder / year, scenes, f"COCO_{year}_{{:012d}}.jpg".format)
        # VQAv2's test-dev questions are a part of its test questions.
        part = questions[: len(questions) // 2] if split == "test-dev2015" else questions
        records = [
            {"image_id": i, "question": question.text, "question_id": 262148000 + n}
            for n, (i, question) in enumerate(part)
        ]
        _write(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": records})
    annotations = [
        {
            "question_id": 262148000 + number,
            "image_id": i,
            "answer_type": "number" if question.type == "count" else "other",
            "question_type": question.type,
            "multiple_choice_answer": question.answer,
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": k + 1}
                for k, answer in enumerate(_annotators(question.answer, rng))
            ],
        }
        for number, (i, question) in enumerate(questions)
    ]
    _write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def _vizwiz(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    for split in ("val", "test"):
        _write_images(folder / split, scenes, f"VizWiz_{split}_{{:08d}}.jpg".format)
        records = []
        for i, scene in enumerate(scenes):
            question = ask(scene, rng)[0]
            record: dict[str, Any] = {"image": f"VizWiz_{split}_{i:08d}.jpg", "question": question.text}
            if split == "val":
                answers = _annotators(question.answer, rng)
                record |= {"answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers]}
                record |= {"answer_type": "number", "answerable": 1}
            records.append(record)
        _write(folder / "Annotations" / f"{split}.json", records)


def _gqa(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    _write_images(folder / "images", scenes, lambda i: f"n{i}.jpg")
    records = {
        f"2012{number:04d}": {
            "question": question.text,
            "imageId": f"n{i}",
            "answer": question.answer,
            "fullAnswer": f"It is {question.answer}.",
            "types": {"structural": "query", "semantic": "attr", "detailed": question.type},
            "isBalanced": True,
        }
        for number, (i, question) in enumerate(_questions(scenes, rng))
    }
    _write(folder / "testdev_balanced_questions.json", records)


def _docvqa(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    _write_images(folder / "spdocvqa_images", scenes, lambda i: f"doc{i}_1.png", "PNG")
    records = [
        {
            "questionId": 49153 + number,
            "question": question.text,
            "question_types": ["form"],
            "image": f"documents/doc{i}_1.png",
            "docId": i,
            "answers": [question.answer, question.answer.upper()],
            "data_split": "val",
        }
        for number, (i, question) in enumerate(_questions(scenes, rng))
    ]
    _write(folder / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": records})


def _infovqa(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    _write_images(folder / "infographicsvqa_images", scenes, lambda i: f"{37000 + i}.jpeg")
    records = [
        {
            "questionId": 98313 + number,
            "question": question.text,
            "image_local_name": f"{37000 + i}.jpeg",
            "answers": [question.answer],
            "answer_type": ["single span"],
            "data_split": "val",
        }
        for number, (i, question) in enumerate(_questions(scenes, rng))
    ]
    _write(folder / "infographicsVQA_val_v1.0_withQT.json", {"dataset_split": "val", "data": records})


def _chartqa(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    _write_images(folder / "test" / "png", scenes, lambda i: f"{i}.png", "PNG")
    for half, types in (("human", ("count",)), ("augmented", ("colour", "shape", "position"))):
        records = [
            {"imgname": f"{i}.png", "query": question.text, "label": question.answer}
            for i, question in _questions(scenes, rng)
            if question.type in types
        ]
        _write(folder / "test" / f"test_{half}.json", records)


def _mmbench(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    """Write MMBench's format: each rotation of the options is a row, and only an image's first row holds the image."""
    rows, first_of_scene = [], dict[int, int]()
    for number, (i, question) in enumerate(_questions(scenes, rng)):
        options = _options(question, rng)
        right = options.index(question.answer)
        # Every third question has no rotations, as some have none in the published file.
        for turn in range(len(options) if number % 3 else 1):
            index = number + turn * _ROTATION
            encoded = str(first_of_scene[i]) if i in first_of_scene else base64.b64encode(_image(scenes[i])).decode()
            first_of_scene.setdefault(i, index)
            turned = [*options[turn:], *options[:turn], *[""] * (4 - len(options))]
            letter = _LETTERS[(right - turn) % len(options)]
            rows.append([str(index), question.text, "", *turned, letter, question.type, encoded])
    header = ["index", "question", "hint", *_LETTERS, "answer", "category", "image"]
    text = "\n".join("\t".join(row) for row in [header, *rows])
    _write(folder / "mmbench_dev_20230712.tsv", f"{text}\n".encode())


def _mmvet(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    _write_images(folder / "images", scenes, lambda i: f"v1_{i}.png", "PNG")
    records = {
        f"v1_{i}": {
            "imagename": f"v1_{i}.png",
            "question": "What is in the image?",
            "answer": scene.caption,
            "capability": ["rec", "spat"],
        }
        for i, scene in enumerate(scenes)
    }
    _write(folder / "mm-vet.json", records)


def _mmmu(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    """Write MMMU's format: two subjects, questions with one or two images, with and without options."""
    for subject in ("Art", "Math"):
        rows = []
        for number, (i, question) in enumerate(_questions(scenes, rng)):
            is_open, several = number % 4 == 3, number % 3 == 2
            options = [] if is_open else _options(question, rng)
            row: dict[str, Any] = {
                "id": f"validation_{subject}_{number}",
                "question": f"<image 1> {question.text}" + (" See also <image 2>." if several else ""),
                "options": str(options),
                "answer": question.answer if is_open else _LETTERS[options.index(question.answer)],
                "question_type": "open" if is_open else "multiple-choice",
                "subfield": question.type,
            }
            for k in range(1, 8):
                shown = scenes[(i + k - 1) % len(scenes)] if k <= 1 + several else None
                row[f"image_{k}"] = None if shown is None else {"bytes": _image(shown), "path": f"{number}_{k}.png"}
            rows.append(row)
        sink = pa.BufferOutputStream()
        encoded = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        texts = ("id", "question", "options", "answer", "question_type", "subfield")
        schema = pa.schema([(name, pa.string()) for name in texts] + [(f"image_{k}", encoded) for k in range(1, 8)])
        pq.write_table(pa.Table.from_pylist(rows, schema), sink)
        _write(folder / subject / "validation-00000-of-00001.parquet", sink.getvalue().to_pybytes())


def _pope(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    _write_images(folder / "val2014", scenes, lambda i: f"COCO_val2014_{i:012d}.jpg")
    for category in ("random", "popular", "adversarial"):
        records: list[dict[str, Any]] = []
        for i, scene in enumerate(scenes):
            there = scene.shapes[0].shape
            shown = {thing.shape for thing in scene.shapes}
            for shape in (there, *[absent for absent in SHAPES if absent not in shown][:1]):
                label = "yes" if shape in shown else "no"
                text = f"Is there a {shape} in the image?"
                image = f"COCO_val2014_{i:012d}.jpg"
                records.append({"question_id": len(records) + 1, "image": image, "text": text, "label": label})
        lines = "\n".join(json.dumps(record) for record in records)
        _write(folder / f"coco_pope_{category}.json", f"{lines}\n".encode())


def _seed(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    _write_images(folder / "SEED-Bench-image", scenes, lambda i: f"{1454426 + i}_{i}")
    records: list[dict[str, Any]] = []
    types: dict[str, int] = {}
    for i, question in _questions(scenes, rng):
        options = _options(question, rng)
        choices = {f"choice_{'abcd'[k]}": option for k, option in enumerate(options)}
        record = {
            "question_id": str(101669 + len(records)),
            "question": question.text,
            "answer": _LETTERS[options.index(question.answer)],
            "data_id": f"{1454426 + i}_{i}",
            "data_type": "image",
            "question_type_id": types.setdefault(question.type, len(types) + 1),
        }
        records.append(record | choices)
    records.append({**records[0], "question_id": "v1", "data_type": "video", "data_id": "a_video.mp4"})
    _write(folder / "SEED-Bench.json", {"questions": records, "question_type": types})


def _nlvr(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    """Write each NLVR statement twice: about the image and about its mirror image."""
    records = []
    for i, scene in enumerate(scenes):
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        answer = "true" if any(thing.shape == shape for thing in scene.shapes) else "false"
        encoded = draw(scene)
        for order in range(2):
            name = f"test-{i}-0-{order}.png"
            sink = io.BytesIO()
            (encoded if order == 0 else encoded.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).save(sink, "PNG")
            _write(folder / "images" / name, sink.getvalue())
            text = f"<image>\nThere is a {shape}.\nIs this statement true of the image? Answer with true or false."
            turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
            records.append({"id": f"test-{i}-0-{order}", "image": name, "conversations": turns})
    _write(folder / "nlvr_llava.json", records)


_WRITERS: dict[str, Callable[[Path, Sequence[Scene], np.random.Generator], None]] = {
    "textvqa": _textvqa,
    "vqav2": _vqav2,
    "vizwiz": _vizwiz,
    "gqa": _gqa,
    "docvqa": _docvqa,
    "infovqa": _infovqa,
    "chartqa": _chartqa,
    "mmbench": _mmbench,
    "mmvet": _mmvet,
    "mmmu": _mmmu,
    "pope": _pope,
    "seed": _seed,
    "nlvr": _nlvr,
}
