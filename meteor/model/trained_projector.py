"""Trained projectors without their language model, from pretrain's file or from a finished model."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from meteor import storage
from meteor.cache.identity import CacheIdentity
from meteor.checksums import check_folder, read_checksums
from meteor.errors import CheckpointError
from meteor.model.configuration import MeteorConfig
from meteor.projector import Projector, build_projector
from meteor.projector.file import load_weights, read_model_weights, read_projector_file
from meteor.vision.digest import weights_digest

PROJECTOR_PREFIX = "projector."
PROJECTOR_FILE = "projector.safetensors"
_FIELDS = ("projector", "vision_width", "llm_width", "select_layer", "cache_identity")


@dataclass(frozen=True, eq=False)
class TrainedProjector:
    """A trained projector and the features it was trained for.

    Attributes:
        uri: file or directory that the projector was read from.
        module: the projector, in evaluation mode.
        select_layer: index of the encoder's hidden state that the projector reads.
        cache_identity: identity of the feature cache; features of other caches are refused
            (`CacheIdentity.require_match`).
        digest: sha256 over stored weights, settings, layer and cache key, 64 hexadecimal digits. A file and a model
            directory have equal digests if they hold equal weights in the same dtype.
    """

    uri: str
    module: Projector
    select_layer: int
    cache_identity: CacheIdentity
    digest: str

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


def projector_metadata(config: MeteorConfig) -> dict[str, Any]:
    """Return the metadata that a projector file stores beside the weights."""
    return {
        "projector": config.projector,
        "vision_width": config.vision_config.hidden_size,
        "llm_width": config.text_config.hidden_size,
        "select_layer": config.select_layer,
        "cache_identity": config.cache_identity,
    }


def load_trained_projector(uri: str, *, device: str, dtype: torch.dtype) -> TrainedProjector:
    """Load a trained projector without its language model.

    Args:
        uri: pretrain's ``projector.safetensors``, its folder, or the directory of a finished model, from which only the
            projector's tensors are read; a local path or s3:// URI.
        device: "cpu" or "cuda".
        dtype: dtype of the weights, and thus of the visual tokens.

    Raises:
        CheckpointError: there is no projector, or the projector is damaged.
        SettingsError: the projector's name or a setting is unknown to this version.
    """
    uri = storage.absolute(uri)
    metadata, weights = _read(uri)
    identity = CacheIdentity.from_dict(metadata["cache_identity"])
    module = build_projector(
        **metadata["projector"], vision_width=metadata["vision_width"], llm_width=metadata["llm_width"]
    )
    load_weights(module, weights, uri)
    module.requires_grad_(False)
    content = [weights_digest(weights), module.settings, metadata["select_layer"], identity.key]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return TrainedProjector(uri, module.to(device, dtype).eval(), metadata["select_layer"], identity, digest)


def _read(uri: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the projector's metadata and weights."""
    config_uri, file_uri = storage.join(uri, "config.json"), storage.join(uri, PROJECTOR_FILE)
    if storage.exists(uri):
        metadata, weights = read_projector_file(uri)
    elif storage.exists(file_uri):
        metadata, weights = read_projector_file(file_uri)
    elif storage.exists(config_uri):
        check_folder(uri, ["config.json"])
        metadata, weights = projector_metadata(_read_config(config_uri)), read_model_weights(uri, PROJECTOR_PREFIX)
        _check_digest(uri, weights)
    else:
        raise CheckpointError(
            f"there is no projector at {uri}: give the {PROJECTOR_FILE} that pretrain wrote, or the model directory that "
            "finetune wrote"
        )
    if missing := [name for name in _FIELDS if metadata.get(name) is None]:
        raise CheckpointError(
            f"{uri} holds no trained projector: its metadata lacks {', '.join(missing)}. Give the {PROJECTOR_FILE} that "
            "pretrain wrote, or the model directory that finetune wrote"
        )
    return metadata, weights


def _check_digest(uri: str, weights: dict[str, torch.Tensor]) -> None:
    checksums = read_checksums(uri)
    if checksums and checksums["projector"] != weights_digest(weights):
        raise CheckpointError(
            f"{uri}: the projector's weights are damaged, as they do not match their digest. Restore the folder from a copy, "
            "or run finetune again"
        )


def _read_config(uri: str) -> MeteorConfig:
    content = storage.read_json(uri)
    found = content.get("model_type") if isinstance(content, dict) else None
    if found != MeteorConfig.model_type:
        raise CheckpointError(
            f"{uri} describes a model of type {found!r}, not {MeteorConfig.model_type!r}: it has no projector of this "
            "project. Give the model directory that finetune wrote"
        )
    try:
        return MeteorConfig.from_dict(content)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{uri} is damaged or from a later version ({error}); copy the model again") from error
