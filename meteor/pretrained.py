"""Loading of Hugging Face checkpoints from a folder, the hub or an object store, with incomplete ones refused.

The check is needed because transformers gives missing weights random values and only prints a warning.
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
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from meteor import storage
from meteor.errors import DamagedError, SettingsError
from meteor.formatting import format_bytes, shorten
from meteor.home import expand_home
from meteor.model_files import require_config, require_plain_weights, require_whole

_LOG = logging.getLogger(__name__)
_LONGEST_SHOWN = 500


@functools.lru_cache(maxsize=64)
def local_model(path: str | os.PathLike[str]) -> str:
    """Return a path that transformers can open: the local copy of an s3:// folder; other paths and hub ids unchanged.

    A node copies a model once, and its processes share the copy. The copy's name is a digest of the names, sizes and etags
    of the files, and the copy appears only when it is complete. The environment variable ``METEOR_MODELS`` names the folder
    of copies (default ``~/.cache/meteor/models``).

    Raises:
        SettingsError: there is no config.json below the s3:// folder.
        StorageError: the s3:// folder cannot be read, or a file's name leads out of the folder.
    """
    path = os.fspath(path)
    if not path.startswith("s3://"):
        return path
    root = storage.absolute(path)
    files = {info.uri.removeprefix(root + "/"): info for info in storage.list_objects(root)}
    if "config.json" not in files:
        raise SettingsError(f"{path} holds no model: there is no config.json among its {len(files)} files")
    digest = hashlib.sha256(repr([(name, file.size_bytes, file.etag) for name, file in files.items()]).encode())
    folder = Path(expand_home(os.environ.get("METEOR_MODELS", "~/.cache/meteor/models")), digest.hexdigest()[:32])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases the lock even if the process is killed
        if not folder.is_dir():
            size = sum(file.size_bytes for file in files.values())
            _LOG.info("Copying the model %s (%s) to %s", path, format_bytes(size), folder)
            partial = Path(f"{folder}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            download_folder(root, str(partial))
            partial.rename(folder)
    return str(folder)


def download_folder(uri: str, folder: str) -> int:
    """Copy all files below an s3:// folder into a local folder, and return their number.

    Raises:
        UnsafeNameError: a file's name leads out of the folder; nothing has been copied then.
    """
    root = storage.absolute(uri)
    files = storage.list_objects(root)
    targets = [storage.join_below(folder, info.uri.removeprefix(root + "/")) for info in files]
    for info, target in zip(files, targets, strict=True):
        storage.download_file(info.uri, target)
    return len(files)


def read_config(path: str, *, setting: str, example: str) -> PretrainedConfig:
    """Read the configuration of a model, and check the files beside it; see `meteor.model_files`.

    Args:
        path: local directory, s3:// folder or hub id.
        setting: dotted name of the setting that holds the path, for the error.
        example: hub id of a suitable model, for the error.

    Raises:
        SettingsError: there is no readable configuration, the model is quantised, or the folder's files are not whole.
    """
    folder = local_model(path)
    require_whole(folder, setting=setting)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # A configuration may hold anything, and each class of transformers stumbles in its own way.
    except Exception as error:
        raise SettingsError(
            f"{setting}={path!r} has no readable configuration ({_said(error)}). Give a local directory with config.json and "
            f"weights, or a hub id that this machine can reach, such as {example}"
        ) from error
    require_plain_weights(config, path, setting=setting)
    return config


def _said(error: Exception) -> str:
    return shorten(" ".join(str(error).split()), _LONGEST_SHOWN) or type(error).__name__


def load_pretrained(model_class: Any, path: str, *, setting: str, example: str, **kwargs: Any) -> Any:
    """Load a model by ``model_class.from_pretrained``, and refuse a checkpoint that lacks weights.

    Code of the model's repository is never run. Weights of other parts, for example CLIP's text tower, are ignored. ``.bin``
    files are read with ``weights_only``, the default of transformers.

    Args:
        model_class: model class or auto class of transformers.
        path: local directory, s3:// folder or hub id.
        setting: dotted name of the setting that holds the path, for the error.
        example: hub id of a suitable model, for the error.
        **kwargs: further arguments of ``from_pretrained``.

    Raises:
        SettingsError: there is no loadable model, its files are not whole, or tensors are missing or have another shape.
        DamagedError: files of a model of this project are damaged.
    """
    folder = local_model(path)
    require_whole(folder, setting=setting)
    try:
        require_config(folder)
        with _without_report():
            model, info = model_class.from_pretrained(
                folder, output_loading_info=True, trust_remote_code=False, **kwargs
            )
    except DamagedError:
        raise
    # Among them are KeyError, ImportError and the errors of safetensors and of unpickling.
    except Exception as error:
        raise SettingsError(
            f"{setting}={path!r} cannot be loaded ({_said(error)}). Give a local directory with config.json and weights, or a "
            f"hub id that this machine can reach, such as {example}"
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
    """Silence transformers' table of unused tensors; `load_pretrained` itself checks for missing tensors."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
