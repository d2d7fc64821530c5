"""Hugging Face checkpoints, whole or not at all: transformers fills what is missing with random weights and goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from meteor.errors import SettingsError


def load_pretrained(model_class: Any, path: str, *, setting: str, example: str, **kwargs: Any) -> Any:
    """``model_class.from_pretrained(path)``, refusing a checkpoint that lacks a weight; no repository's code is run.

    Weights of other parts (the text half of CLIP, say) are left out without a word. ``.bin`` files are read with
    ``weights_only``, transformers' default.

    Args:
        model_class: a transformers model or auto class.
        path: local directory or hub id.
        setting: what the path is called in the settings, for the error.
        example: a hub id that would do, for the error.
        **kwargs: of ``from_pretrained``.

    Raises:
        SettingsError: nothing loadable there, or tensors are missing or of another shape.
    """
    try:
        with _without_report():
            model, info = model_class.from_pretrained(path, output_loading_info=True, trust_remote_code=False, **kwargs)
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
