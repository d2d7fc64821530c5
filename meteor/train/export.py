"""What a finished stage leaves behind: the projector as one file, or the whole model as a Hugging Face directory.

Both are made from the last checkpoint's fp32 masters, tensor by tensor, so any ZeRO stage exports the same way.
"""

import tempfile
from pathlib import Path

import torch

from meteor import storage
from meteor.checkpoint.format import Checkpoint
from meteor.errors import CacheMismatchError
from meteor.model import MeteorForConditionalGeneration, MeteorProcessor
from meteor.model.trained_projector import PROJECTOR_PREFIX, projector_metadata
from meteor.projector.file import write_projector_file
from meteor.train.lora import Lora, merge_lora, write_adapter
from meteor.train.protocol import load_weights
from meteor.vision.encoder import FrozenClip

LLM_PREFIX = "language_model."


def export_projector(model: MeteorForConditionalGeneration, checkpoint: Checkpoint, uri: str) -> None:
    """Write ``projector.safetensors``: fp32 weights, with settings, widths and cache identity in its metadata."""
    names = [name for name in checkpoint.shapes if name.startswith(PROJECTOR_PREFIX)]
    weights = {name.removeprefix(PROJECTOR_PREFIX): checkpoint.read("weights", name) for name in names}
    # Frozen tables of a projector are part of it though they are in no checkpoint.
    for name, value in model.projector.state_dict().items():
        weights.setdefault(name, value.detach().float().cpu().contiguous())
    write_projector_file(uri, weights, projector_metadata(model.config))


def export_adapter(
    model: MeteorForConditionalGeneration, checkpoint: Checkpoint, lora: Lora, llm_path: str, uri: str
) -> None:
    """Write what a LoRA stage trained and no more: the adapters in peft's format, and ``projector.safetensors``.

    Args:
        model: with adapters.
        checkpoint: the last one.
        lora: as they were added.
        llm_path: the language model that they belong to.
        uri: folder or s3:// prefix.
    """
    write_adapter(model.language_model, checkpoint, lora, uri, prefix=LLM_PREFIX, base=llm_path)
    export_projector(model, checkpoint, storage.join(uri, "projector.safetensors"))


def export_model(
    model: MeteorForConditionalGeneration,
    checkpoint: Checkpoint,
    encoder: FrozenClip,
    processor: MeteorProcessor,
    uri: str,
    dtype: torch.dtype,
    *,
    lora: Lora | None = None,
) -> None:
    """Write a Hugging Face directory: weights (sharded safetensors), configuration, processor, and the encoder.

    Args:
        model: a model of this stage on the CPU, built without its tower; its weights are replaced by the checkpoint's.
        checkpoint: the last one of stage 2.
        encoder: as loaded from disk, in its stored type.
        processor: tokenizer, slicing, prompt.
        uri: folder or s3:// prefix.
        dtype: of the stored language model and projector.
        lora: of the adapters that ``model`` has; they are merged into its weights.

    Raises:
        CacheMismatchError: the encoder is not the one whose features the model was trained on.
    """
    identity = model.config.cache_identity or {}
    if encoder.weights_digest != identity.get("encoder_digest"):
        raise CacheMismatchError(
            f"encoder_digest: the cache was made by {identity.get('encoder_digest')}, "
            f"vision.path holds {encoder.weights_digest}"
        )
    load_weights(model, checkpoint)
    if lora is not None:
        merge_lora(model.language_model, checkpoint, lora, prefix=LLM_PREFIX)
    model.to(dtype)
    model.vision_tower = encoder.model
    model.requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        # config.json last: a directory that has one is complete.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == "config.json"):
            storage.upload_file(str(file), storage.join(uri, file.name))
