"""Generated samples of the shape of LLaVA's 665K mixture, a tokenizer of Llama's kind, and an index of the images.

The words are those of Python's own library and of installed packages' documentation. They vary more than those of LLaVA's
files, so that a memory of words gets no help from the generator.
"""

import hashlib
import json
import random
import re
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import sentencepiece

from meteor.cache.index import INDEX_SCHEMA

VOCABULARY_SIZE = 32_000
MIXTURE_SIZE = 665_298
NUM_IMAGES = 380_000
_CORPUS_BYTES = 40_000_000
_TRAINING_LINES = 150_000
_SHORT = "\nAnswer the question using a single word or phrase."
# Share of the samples, folder of the images (None: text alone), rounds from and to, words of a question and of an answer,
# and what ends the question. Shares are those of the mixture's parts.
_PARTS: tuple[tuple[float, str | None, int, int, int, int, str], ...] = (
    (0.086, "coco/train2017", 3, 6, 10, 18, ""),
    (0.151, "coco/train2017", 1, 1, 12, 80, ""),
    (0.061, None, 1, 11, 35, 100, ""),
    (0.138, "coco/train2017", 3, 7, 6, 1, _SHORT),
    (0.108, "gqa/images", 8, 18, 7, 1, _SHORT),
    (0.120, "ocr_vqa/images", 6, 12, 5, 3, _SHORT),
    (0.099, "coco/train2017", 1, 1, 25, 1, "\nAnswer with the option's letter from the given choices directly."),
    (0.033, "textvqa/train_images", 1, 1, 20, 12, ""),
    (
        0.204,
        "vg/VG_100K",
        1,
        5,
        0,
        6,
        "\nPlease provide a short description for this region: [0.%03d, 0.%03d, 0.%03d, 0.%03d]",
    ),
)


def corpus() -> list[str]:
    """Paragraphs of documentation, in an order that does not change."""
    roots = [Path(sysconfig.get_paths()["stdlib"]), *map(Path, site.getsitepackages())]
    paragraphs: list[str] = []
    size = 0
    for path in sorted(path for root in roots for path in root.rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        for found in re.findall(r'"""(.+?)"""', text, re.DOTALL):
            lines = " ".join(line.strip() for line in found.split("\n"))
            if len(lines) > 80:
                paragraphs.append(lines)
                size += len(lines)
        if size > _CORPUS_BYTES:
            break
    return paragraphs


def make_tokenizer(folder: Path, paragraphs: list[str]) -> None:
    """Write a SentencePiece BPE of 32,000 pieces with Llama's own options, as Vicuna ships it."""
    folder.mkdir(parents=True)
    chance = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(chance.sample(paragraphs, min(_TRAINING_LINES, len(paragraphs)))),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY_SIZE,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9999,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=2,
        minloglevel=2,
    )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_records(num_samples: int, paragraphs: list[str], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records as LLaVA writes them."""
    chance = random.Random(seed)
    words = " ".join(paragraphs).split(" ")
    shares = [part[0] for part in _PARTS]
    num_images = max(num_samples * NUM_IMAGES // MIXTURE_SIZE, 1)

    def text(mean: int) -> str:
        count = max(1, int(chance.expovariate(1 / mean))) if mean > 3 else mean
        start = chance.randrange(len(words) - count)
        return " ".join(words[start : start + count])

    for number in range(num_samples):
        _, folder, least, most, question_words, answer_words, ending = chance.choices(_PARTS, shares)[0]
        turns = []
        for round_ in range(chance.randint(least, most)):
            end = ending % tuple(chance.randrange(1000) for _ in range(4)) if "%" in ending else ending
            question = (text(question_words) if question_words else "") + end
            if folder and round_ == 0:
                question = f"<image>\n{question}" if chance.random() < 0.7 else f"{question}\n<image>"
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": text(answer_words)}]
        image = {} if folder is None else {"image": image_name(folder, chance.randrange(num_images))}
        yield {"id": f"{number:012d}", **image, "conversations": turns}


def image_name(folder: str, number: int) -> str:
    return f"{folder}/{number:012d}.jpg"


def write_records(path: Path, records: Iterator[dict[str, Any]]) -> None:
    """One indented list, as LLaVA's file is."""
    with path.open("w", encoding="utf-8") as file:
        for number, record in enumerate(records):
            file.write("[\n" if number == 0 else ",\n")
            file.write("\n".join("  " + line for line in json.dumps(record, indent=2).split("\n")))
        file.write("\n]\n")


def make_index(names: pa.Array) -> pa.Table:
    """An index of the images with these names: the sizes of COCO, Visual Genome and book covers, all good."""
    chance = np.random.default_rng(0)
    sides = np.array([640, 480, 427, 500, 375, 333, 1024, 768, 800, 600, 1600, 350])
    width, height = (chance.choice(sides, len(names)) - chance.integers(0, 24, len(names)) for _ in range(2))
    listed = names.to_pylist()
    columns = {
        "name": listed,
        "uri": [f"/images/{name}" for name in listed],
        "size_bytes": np.full(len(names), 150_000),
        "etag": [""] * len(names),
        "image_key": [hashlib.sha256(name.encode()).hexdigest() for name in listed],
        "width": width.astype(np.int32),
        "height": height.astype(np.int32),
        "status": ["ok"] * len(names),
        "reason": [""] * len(names),
    }
    return pa.table(columns, schema=INDEX_SCHEMA).sort_by([("uri", "ascending"), ("name", "ascending")])
