"""Damage to every file of a finished run, and what readers make of it. For tests and benchmarks."""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from meteor import storage
from meteor.cache.pins import pins
from meteor.checkpoint.format import KINDS, Checkpoint
from meteor.checksums import intact, read_checked_json
from meteor.errors import MeteorError
from meteor.model import MeteorForConditionalGeneration
from meteor.model.trained_projector import load_trained_projector
from meteor.runs.reading import read_stage
from meteor.runs.verify import verify
from pipelines.ray_parts.answers import AnswerStore

# Readers by the path of a file below the output folder: pattern -> function that reads what the file belongs to.
READERS: dict[str, Callable[[Path], Any]] = {
    r"runs/.*/tracking\.json": lambda file: read_checked_json(str(file)),
    r"runs/.*/attempts/.*": lambda file: read_checked_json(str(file)),
    r"runs/\w+-\w+/(run\.json|summary\.json|checksums\.json|metrics/.*|[^/]+\.(parquet|json|jsonl))": lambda file: (
        _read_stage(_stage(file))
    ),
    r"runs/.*/model/.*": lambda file: _read_model(file.parent),
    r"runs/.*/checkpoints/.*": lambda file: _read_checkpoint(_step(file)),
    r"pins/.*": lambda file: read_checked_json(str(file)),
    r"cache/.*/pins/.*": lambda file: [{**pin, "pinned_s": 0} for pin in pins(str(file.parents[1]))],
    r"answers/.*": lambda file: AnswerStore(str(file.parent)).read(),
    r"cache/index/samples/files/.*": lambda file: read_checked_json(str(file)),
    r"cache/index/samples/.*": lambda file: {path.name: intact(str(path)) for path in file.parent.glob("*.json")},
}
# Files that only this run's own start reads; a next start writes or ignores them.
UNREAD = r"runs/.*/checkpoints/.*/rank_\d+\.json|runs/.*/tracking\.json"


@dataclass
class Kind:
    """Counts for files of one kind.

    Attributes:
        tried: number of damaged files.
        refused: damage that the reader named, in an error of this project or in the log if the file can be made again.
        harmless: damage after which the reader returned equal values.
        silent: descriptions of damage after which it returned other values.
        raw: descriptions of damage that raised any other exception.
        unverified: descriptions of damage that changes what is read and that `verify` did not report.
    """

    tried: int = 0
    refused: int = 0
    harmless: int = 0
    silent: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)


def damage_everything(out: Path, *, flips: int, seed: int = 0) -> dict[str, Kind]:
    """Damage each file of a finished run's output folder in turn, read it, and restore it.

    Args:
        out: output folder of the run; its files are written, and are as before in the end.
        flips: number of single flipped bits per file, beside cuts, zeros and an empty file.
        seed: seed of the places.

    Returns:
        Kind of file -> counts.
    """
    rng, kinds = random.Random(seed), dict[str, Kind]()
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(file.relative_to(out))
        read = next((reader for pattern, reader in READERS.items() if re.fullmatch(pattern, name)), None)
        if read is None:
            continue
        kind = kinds.setdefault(_kind(name), Kind())
        intact, expected = file.read_bytes(), read(file)
        for what, data in damaged(intact, flips, rng):
            file.write_bytes(data)
            kind.tried += 1
            is_refused = _try(kind, f"{name}, {what}", read, file, expected)
            if is_refused and not re.fullmatch(UNREAD, name) and not _is_reported(out, name):
                kind.unverified.append(f"{name}, {what}")
        file.write_bytes(intact)
    return kinds


def damaged(data: bytes, flips: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield a description and the bytes of damaged copies of a file."""
    for _ in range(flips):
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        yield f"bit {bit} of byte {place} flipped", data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
    yield "cut in the middle", data[: len(data) // 2]
    yield "last byte cut off", data[:-1]
    yield "empty", b""
    yield "zeros", bytes(len(data))
    start = rng.randrange(len(data))
    yield "zeros in the middle", data[:start] + bytes(len(data[start : start + 64])) + data[start + 64 :]


def _try(kind: Kind, what: str, read: Callable[[Path], Any], file: Path, expected: Any) -> bool:
    try:
        found = read(file)
    except MeteorError:
        kind.refused += 1
        return True
    except Exception as error:  # noqa: BLE001  (what is counted)
        kind.raw.append(f"{what}: {type(error).__name__}: {error}")
        return False
    # A damaged file that can be made again counts for nothing, said in the log.
    if found == expected:
        kind.harmless += 1
    elif found == {} or (isinstance(found, dict) and None in found.values()):
        kind.refused += 1
    else:
        kind.silent.append(what)
    return False


def _is_reported(out: Path, name: str) -> bool:
    parts = Path(name).parts
    return any(outcome.problems for outcome in verify(str(out.joinpath(*parts[: 2 if parts[0] == "runs" else 1]))))


def _kind(name: str) -> str:
    """Return a file's name without numbers and digests."""
    name = re.sub(r"^(runs/\w+)-\w+/", r"\1/", name)
    name = re.sub(r"step_\d+/[0-9a-f]{8}/", "step/", name)
    return re.sub(r"[0-9a-f]{8,}(-[0-9a-f]{8})?|\d{3,}(_\d+)*", "N", name)


def _stage(file: Path) -> str:
    return str(next(folder for folder in file.parents if (folder.parent.name == "runs")))


def _step(file: Path) -> str:
    return str(next(folder for folder in file.parents if folder.name.startswith("step_")))


def _read_stage(uri: str) -> Any:
    record = read_stage(uri)
    predictions = storage.join(uri, "predictions.parquet")
    content = storage.read_bytes(predictions) if storage.exists(predictions) else b""
    return vars(record), content


def _read_model(folder: Path) -> Any:
    projector = load_trained_projector(str(folder), device="cpu", dtype=torch.float32)
    if not (folder / "checksums.json").exists() and (folder / "projector.safetensors").exists():
        return projector.digest
    model = MeteorForConditionalGeneration.from_pretrained(folder)
    tensors = {name: value.double().nan_to_num().sum().item() for name, value in model.state_dict().items()}
    return projector.digest, model.config.to_dict(), tensors


def _read_checkpoint(uri: str) -> Any:
    checkpoint = Checkpoint(uri)
    values = {f"{kind} {name}": checkpoint.read(kind, name).tolist() for kind in KINDS for name in checkpoint.shapes}
    return checkpoint.state, checkpoint.shapes, values
