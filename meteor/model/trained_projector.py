"""A trained projector by itself, without its language model: from pretrain's file, or out of a finished model."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from meteor import storage
from meteor.cache.identity import CacheIdentity
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
    """A projector and what it was trained for.

    Attributes:
        uri: where it was read.
        module: the projector, in evaluation mode.
        select_layer: hidden state of the encoder that it reads.
        cache_identity: features of other caches mean nothing to it (`CacheIdentity.require_match`).
        digest: sha256 over stored weights, settings, layer and cache key, 64 hexadecimal digits. A file and a model
            directory agree where they hold the same weights in the same type.
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
    """What a projector file says about itself."""
    return {
        "projector": config.projector,
        "vision_width": config.vision_config.hidden_size,
        "llm_width": config.text_config.hidden_size,
        "select_layer": config.select_layer,
        "cache_identity": config.cache_identity,
    }


def load_trained_projector(uri: str, *, device: str, dtype: torch.dtype) -> TrainedProjector:
    """Load a projector, and nothing but the projector.

    Args:
        uri: ``projector.safetensors`` of pretrain or the folder that holds it, or the directory of a finished model, of
            which the projector's tensors alone are read; local or s3://.
        device: "cpu" or "cuda".
        dtype: of the weights, and so of the tokens.

    Raises:
        CheckpointError: there is no projector, or it is damaged.
        SettingsError: it was made by a projector or with a setting that is not known here.
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
    """What the projector says about itself, and its weights."""
    config_uri, file_uri = storage.join(uri, "config.json"), storage.join(uri, PROJECTOR_FILE)
    if storage.exists(uri):
        metadata, weights = read_projector_file(uri)
    elif storage.exists(file_uri):
        metadata, weights = read_projector_file(file_uri)
    elif storage.exists(config_uri):
        metadata, weights = projector_metadata(_read_config(config_uri)), read_model_weights(uri, PROJECTOR_PREFIX)
    else:
        raise CheckpointError(
            f"there is no projector at {uri}: name the {PROJECTOR_FILE} that pretrain leaves, or the model directory that "
            "finetune leaves"
        )
    if silent := [name for name in _FIELDS if metadata.get(name) is None]:
        raise CheckpointError(
            f"{uri} holds no trained projector: it does not tell {', '.join(silent)}. Name the {PROJECTOR_FILE} that "
            "pretrain leaves, or the model directory that finetune leaves"
        )
    return metadata, weights


def _read_config(uri: str) -> MeteorConfig:
    content = storage.read_json(uri)
    found = content.get("model_type") if isinstance(content, dict) else None
    if found != MeteorConfig.model_type:
        raise CheckpointError(
            f"{uri} describes a model of type {found!r}, not {MeteorConfig.model_type!r}: it has no projector of ours. "
            "Name the model directory that finetune leaves"
        )
    try:
        return MeteorConfig.from_dict(content)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{uri} is damaged, or of a later version ({error}); copy the model again") from error
