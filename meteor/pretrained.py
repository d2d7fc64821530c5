"""Hugging Face checkpoints, from a folder, the hub or an object store; whole or not at all.

transformers fills what is missing with random weights and goes on.
"""

import fcntl
import functools
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from meteor import storage
from meteor.errors import SettingsError
from meteor.formatting import format_bytes

_LOG = logging.getLogger(__name__)


@functools.lru_cache(maxsize=64)
def local_model(path: str | os.PathLike[str]) -> str:
    """What transformers can open: the folder of a copy for an s3:// folder; a local path or a hub id as it is.

    A node copies a model once, whichever process asks first; the copy is named by the names, sizes and etags of the files,
    and appears when it is complete. ``METEOR_MODELS`` names the folder of copies (``~/.cache/meteor/models`` if not set).

    Raises:
        SettingsError: there is no config.json below the s3:// folder.
        StorageError: it cannot be read.
    """
    path = os.fspath(path)
    if not path.startswith("s3://"):
        return path
    root = storage.absolute(path)
    files = {info.uri.removeprefix(root + "/"): info for info in storage.list_objects(root)}
    if "config.json" not in files:
        raise SettingsError(f"{path} holds no model: there is no config.json among its {len(files)} files")
    digest = hashlib.sha256(repr([(name, one.size_bytes, one.etag) for name, one in files.items()]).encode())
    folder = Path(os.environ.get("METEOR_MODELS", "~/.cache/meteor/models")).expanduser() / digest.hexdigest()[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when the process ends, however it ends
        if not folder.is_dir():
            size = sum(one.size_bytes for one in files.values())
            _LOG.info("Copying the model %s (%s) to %s", path, format_bytes(size), folder)
            partial = Path(f"{folder}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            for name, one in files.items():
                storage.download_file(one.uri, str(partial / name))
            partial.rename(folder)
    return str(folder)


def load_pretrained(model_class: Any, path: str, *, setting: str, example: str, **kwargs: Any) -> Any:
    """``model_class.from_pretrained(path)``, refusing a checkpoint that lacks a weight; no repository's code is run.

    Weights of other parts (the text half of CLIP, say) are left out without a word. ``.bin`` files are read with
    ``weights_only``, transformers' default.

    Args:
        model_class: a transformers model or auto class.
        path: local directory, s3:// folder or hub id.
        setting: what the path is called in the settings, for the error.
        example: a hub id that would do, for the error.
        **kwargs: of ``from_pretrained``.

    Raises:
        SettingsError: nothing loadable there, or tensors are missing or of another shape.
    """
    try:
        with _without_report():
            model, info = model_class.from_pretrained(
                local_model(path), output_loading_info=True, trust_remote_code=False, **kwargs
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise SettingsError(
            f"{setting}={path!r} cannot be loaded ({error}). Give a local directory with config.json and weights, or a hub "
            f"id that this machine can reach, such as {example}"
        ) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise SettingsError(
            f"{setting}={path!r} lacks {len(missing)} weights of {type(model).__name__}, for example {missing[:3]}: "
            "it is another model or an incomplete download"
        )
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence the table of tensors that were not used; missing ones are looked at above."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
