"""Preparation of NLVR's images for a run of all stages: `python benchmarks/nlvr.py --source DIR --out outputs/nlvr`.

DIR holds ``nlvr_llava.json`` (LLaVA's format, with a statement per image and the answer true or false) and ``images/``. Every
second image is enlarged to 1200 x 300, so that it is sliced. Statements about one scene stay on one side of the split.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from PIL import Image

ENLARGED = (1200, 300)
HELD_OUT_SHARE = 0.2
_QUESTION = "\nIs this statement true of the image? Answer with true or false."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="folder with NLVR's records and images")
    parser.add_argument("--out", type=Path, required=True, help="folder for the prepared images and samples")
    arguments = parser.parse_args()
    records = json.loads((arguments.source / "nlvr_llava.json").read_text())
    images = arguments.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    for i, record in enumerate(records):
        image = Image.open(arguments.source / "images" / record["image"])
        (image.resize(ENLARGED, Image.Resampling.BICUBIC) if i % 2 else image).save(images / record["image"])
    # test-3776-0-0 and test-3776-0-1 are two box orders of one statement.
    scenes = sorted({scene_of(record) for record in records})
    held_out = set(scenes[:: round(1 / HELD_OUT_SHARE)])
    train = [record for record in records if scene_of(record) not in held_out]
    test = [record for record in records if scene_of(record) in held_out]
    write(arguments.out / "pretrain.json", [caption(record) for record in train if answer(record) == "true"])
    write(arguments.out / "finetune.json", train + two_images(train[::10]))
    write(
        arguments.out / "evaluate.json", [{**record, "type": "one image"} for record in test] + two_images(test[::10])
    )
    print(f"{len(records)} images, {len(train)} statements to train on, {len(test)} held out, in {arguments.out}")


def scene_of(record: dict[str, Any]) -> str:
    return "-".join(record["id"].split("-")[:3])


def answer(record: dict[str, Any]) -> str:
    return record["conversations"][1]["value"]


def statement(record: dict[str, Any]) -> str:
    return record["conversations"][0]["value"].removeprefix("<image>\n").removesuffix(_QUESTION)


def caption(record: dict[str, Any]) -> dict[str, Any]:
    """Make a caption sample of a true statement."""
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": statement(record)}]
    return {"id": record["id"], "image": record["image"], "conversations": turns}


def two_images(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make samples with two images and a statement about the first."""
    pairs = []
    for record, other in itertools.pairwise(records):
        text = f"<image>\n<image>\n{statement(record)}\nIs this statement true of the first image? Answer with true or false."
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer(record)}]
        images = [record["image"], other["image"]]
        pairs.append({"id": f"{record['id']}-pair", "image": images, "conversations": turns, "type": "two images"})
    return pairs


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
