"""Files of a model's folder, compared with what the folder says is there, before a library reads them in its own way.

Libraries load adapters beside the weights in silence, and find an absent shard only after minutes of loading.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meteor.errors import NotFoundError, SettingsError
from meteor.formatting import format_amount

_SUFFIXES = {".json", ".safetensors", ".bin", ".model"}
_SHARD = re.compile(r"(pytorch_)?model-\d+-of-\d+\.(safetensors|bin)")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_ENTRIES = ("model.safetensors", "pytorch_model.bin", *_INDEXES)
_POINTER = b"version https://git-lfs.github.com/spec/"


def require_whole(folder: str | Path, *, setting: str) -> None:
    """Refuse a local folder whose model would be read wrongly, or not at all; other paths and hub ids pass.

    A folder without any weights passes, because plans need configurations alone.

    Args:
        folder: local folder.
        setting: dotted name of the setting that holds the path, for the error.

    Raises:
        SettingsError: a file is empty or a pointer of Git LFS, the folder has adapters, or shards of the weights are missing.
    """
    problem = next(_problems(Path(folder)), None) if Path(folder).is_dir() else None
    if problem is not None:
        raise SettingsError(f"{setting}='{folder}' {problem}")


def require_config(folder: str | Path) -> None:
    """Raise NotFoundError if a local model folder lacks config.json: transformers would build a model of default size."""
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise NotFoundError(f"{folder} holds no model: it has no config.json. Copy the whole folder again")


def require_plain_weights(config: Any, path: str, *, setting: str) -> None:
    """Refuse a quantised model, whose weights cannot be trained and give other features.

    Raises:
        SettingsError: the configuration names a quantisation.
    """
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise SettingsError(
            f"{setting}={path!r} is quantised (quantization_config in config.json, method {method!r}), and its weights cannot "
            "be trained: give the model that it was made from"
        )


def _problems(folder: Path) -> Iterator[str]:
    files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    read = [file for file in files.values() if file.suffix in _SUFFIXES]
    if pointers := [file.name for file in read if _is_pointer(file)]:
        amount = format_amount(len(pointers), "pointer")
        yield (
            f"has {amount} of Git LFS instead of files, for example {pointers[0]}: run `git lfs pull` in the repository from "
            "which the folder comes"
        )
    if empty := [file.name for file in read if not file.stat().st_size]:
        yield f"has {format_amount(len(empty), 'empty file')}, for example {empty[0]}: copy them again"
    if "adapter_config.json" in files:
        yield (
            "has adapters (adapter_config.json), which would be added to the weights in silence: merge them into their model "
            "with peft (merge_and_unload, then save_pretrained), or move them out of the folder"
        )
    yield from _problems_of_weights(files)


def _problems_of_weights(files: dict[str, Path]) -> Iterator[str]:
    shards = [name for name in files if _SHARD.fullmatch(name)]
    entry = next((name for name in _ENTRIES if name in files), None)
    if shards and entry is None:
        amount = format_amount(len(shards), "shard")
        yield f"has {amount} of weights ({shards[0]}), but no index of them ({_INDEXES[0]}): copy it too"
    # A single file of weights is read first, whatever an index beside it names.
    if entry not in _INDEXES:
        return
    try:
        named = set(json.loads(files[entry].read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        yield f"has an index that cannot be read ({entry}: {type(error).__name__}: {error}): copy it again"
        return
    if missing := sorted(str(name) for name in named - files.keys()):
        yield f"lacks {len(missing)} of {len(named)} files that {entry} names, for example {missing[0]}: copy them"


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER
