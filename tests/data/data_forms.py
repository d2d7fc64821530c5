"""One data set in every form that the project reads, for tests: `make_scenes` makes it, `write_form` writes it."""

import base64
import io
import json
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from meteor import storage

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
PAIRS = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())]))
PART = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", IMAGE)])
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(PART))]))


def png(seed, size=(60, 40), image_format="PNG"):
    """Noise as the bytes of an image file."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).save(sink, image_format)
    return sink.getvalue()


def make_scenes(count, *, is_single=False):
    """Return (id, images, pairs of question and answer): with one image, with several, and with none."""
    scenes = []
    for i in range(count):
        num_images = 1 if is_single else (1, 2, 0, 1)[i % 4]
        # Equal images of several samples have one key.
        images = [png((i * 2 + n) % 11) for n in range(num_images)]
        pairs = [(f"what {i}?", f"a cat {i}."), ("and now?", "a dog.")][: 1 + i % 2]
        scenes.append((f"s{i}", images, pairs))
    return scenes


def llava_turns(images, pairs):
    turns = []
    for question, answer in pairs:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = "<image>\n" * len(images) + turns[0]["value"]
    return turns


def parts(images, pairs, as_part):
    """Return chat messages; ``as_part`` makes the part of an image."""
    messages = []
    for number, (question, answer) in enumerate(pairs):
        shown = [as_part(image) for image in images] if not number else []
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def data_uri(image):
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def hub_image(image, path=None):
    return {"bytes": image, "path": path}


def _json_records(form, scenes, save):
    for name, images, pairs in scenes:
        if form.startswith("llava"):
            yield {"id": name, "image": [save(image) for image in images], "conversations": llava_turns(images, pairs)}
        elif form.startswith("beside"):
            messages = parts(images, pairs, lambda image: {"type": "image"})
            yield {"id": name, "images": [save(image) for image in images], "messages": messages}
        elif form.startswith("named"):
            yield {"id": name, "messages": parts(images, pairs, lambda image: {"type": "image", "image": save(image)})}
        elif form.startswith("openai"):
            as_part = lambda image: {"type": "image_url", "image_url": {"url": data_uri(image)}}  # noqa: E731
            yield {"id": name, "messages": parts(images, pairs, as_part)}
        else:
            messages = [
                {"role": role, "content": text}
                for pair in pairs
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            yield {"id": name, "images": [save(image) for image in images], "messages": messages}


def _table(form, scenes):
    ids = pa.array([name for name, _, _ in scenes])
    if form == "onevision.parquet":
        columns = {
            "image": pa.array([hub_image(images[0], "a.png") if images else None for _, images, _ in scenes], IMAGE),
            "conversations": pa.array([llava_turns(images, pairs) for _, images, pairs in scenes], TURNS),
            "data_source": pa.array(["x"] * len(scenes)),
        }
    elif form == "cauldron.parquet":
        texts = [[{"user": q, "assistant": a, "source": "x"} for q, a in pairs] for _, _, pairs in scenes]
        columns = {
            "images": pa.array([list(map(hub_image, images)) for _, images, _ in scenes], pa.list_(IMAGE)),
            "texts": pa.array(texts, PAIRS),
            "image_correspondence_ratings": pa.array([[1, 5]] * len(scenes)),
        }
    else:
        as_part = lambda image: {"type": "image", "image": hub_image(image)}  # noqa: E731
        columns = {
            "messages": pa.array([parts(images, pairs, as_part) for _, images, pairs in scenes], MESSAGES),
        }
    return pa.table({"id": ids, **columns})


def parquet_bytes(table, rows_per_group=3):
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=rows_per_group)
    return sink.getvalue()


def tar_bytes(members):
    """Return an archive of (name, content)."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def _members(scenes):
    for name, images, pairs in scenes:
        for number, image in enumerate(images):
            yield f"{name}.{number}.png", image
        yield f"{name}.json", json.dumps({"id": name, "conversations": llava_turns(images, pairs)}).encode()


# The first is LLaVA's, with which the others are compared; image files lie in the folder ``images``.
FORMS = (
    "llava.json",
    "llava.jsonl",
    "beside.json",
    "beside.jsonl",
    "named.jsonl",
    "openai.json",
    "openai.jsonl",
    "texts.jsonl",
    "cauldron.parquet",
    "parts.parquet",
    "shards.tar",
)
FORMS_OF_ONE_IMAGE = ("onevision.parquet",)


def write_form(form, folder, scenes, *, num_shards=1):
    """Write scenes below a folder, local or s3://, and return the path, folder or pattern that names them."""

    def save(image):
        name = f"{zlib.crc32(image):08x}.png"
        storage.write_bytes(storage.join(folder, "images", name), image)
        return name

    if form.endswith((".json", ".jsonl")):
        lines = [json.dumps(record, ensure_ascii=False) for record in _json_records(form, scenes, save)]
        text = f"[{', '.join(lines)}]" if form.endswith(".json") else "\n".join(lines)
        storage.write_bytes(storage.join(folder, form), text.encode())
        return storage.join(folder, form)
    size = -(-len(scenes) // num_shards)
    for number in range(num_shards):
        some = scenes[number * size : (number + 1) * size]
        content = tar_bytes(_members(some)) if form.endswith(".tar") else parquet_bytes(_table(form, some))
        stem, _, suffix = form.rpartition(".")
        name = form if num_shards == 1 else f"{stem}-{number:05d}.{suffix}"
        storage.write_bytes(storage.join(folder, name), content)
    return storage.join(folder, form if num_shards == 1 else f"{stem}-*.{suffix}")
