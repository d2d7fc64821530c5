"""Export of a finished stage: the projector as one file, or the whole model as a Hugging Face directory.

Both are made from the last checkpoint's fp32 master weights, tensor by tensor, so the ZeRO stage has no influence.
"""

import tempfile
from pathlib import Path

import torch

from meteor import storage
from meteor.checkpoint.format import Checkpoint
from meteor.checksums import checksum, write_checksums
from meteor.errors import CacheMismatchError
from meteor.model import MeteorForConditionalGeneration, MeteorProcessor
from meteor.model.remote import FILE_NAME, SOURCE
from meteor.model.trained_projector import PROJECTOR_PREFIX, projector_metadata
from meteor.projector.file import write_projector_file
from meteor.train.lora import Lora, merge_lora, write_adapter
from meteor.train.protocol import load_weights
from meteor.vision.digest import weights_digest
from meteor.vision.encoder import FrozenEncoder

LLM_PREFIX = "language_model."


def export_projector(model: MeteorForConditionalGeneration, checkpoint: Checkpoint, uri: str) -> None:
    """Write ``projector.safetensors``: fp32 weights, with settings, widths and cache identity in the metadata."""
    names = [name for name in checkpoint.shapes if name.startswith(PROJECTOR_PREFIX)]
    weights = {name.removeprefix(PROJECTOR_PREFIX): checkpoint.read("weights", name) for name in names}
    # Frozen tables are part of the projector, but checkpoints hold trained parameters only.
    for name, value in model.projector.state_dict().items():
        weights.setdefault(name, value.detach().float().cpu().contiguous())
    write_projector_file(uri, weights, projector_metadata(model.config))


def export_adapter(
    model: MeteorForConditionalGeneration, checkpoint: Checkpoint, lora: Lora, llm_path: str, uri: str
) -> None:
    """Write the trained parts of a LoRA stage alone: adapters in peft's format, and ``projector.safetensors``.

    Args:
        model: model with adapters.
        checkpoint: last checkpoint of the stage.
        lora: settings with which the adapters were added.
        llm_path: path of the language model to which the adapters belong.
        uri: folder or s3:// prefix of the written files.
    """
    write_adapter(model.language_model, checkpoint, lora, uri, prefix=LLM_PREFIX, base=llm_path)
    export_projector(model, checkpoint, storage.join(uri, "projector.safetensors"))


def export_model(
    model: MeteorForConditionalGeneration,
    checkpoint: Checkpoint,
    encoder: FrozenEncoder,
    processor: MeteorProcessor,
    uri: str,
    dtype: torch.dtype,
    *,
    lora: Lora | None = None,
) -> None:
    """Write a Hugging Face directory: weights (sharded safetensors), configuration, processor, encoder, and checksums.

    Args:
        model: model of this stage on the CPU, without vision tower; the checkpoint replaces its weights.
        checkpoint: last checkpoint of stage 2.
        encoder: vision tower as loaded from disk, in its stored dtype.
        processor: processor with tokenizer, slicing and prompt.
        uri: folder or s3:// prefix of the written files.
        dtype: dtype of the stored language model and projector.
        lora: settings of the model's adapters, which are merged into its weights; None without adapters.

    Raises:
        CacheMismatchError: the model was trained on another encoder's features.
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
    model.grow_vocabulary(len(processor.tokenizer))
    model.vision_tower = encoder.model
    model.requires_grad_(True)
    model.generation_config = processor.generation_config(model.language_model.generation_config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        # Generation appends tokens on the right, so prompts are padded on the left.
        processor.tokenizer.padding_side = "left"
        processor.save_pretrained(folder)
        (Path(folder) / FILE_NAME).write_text(SOURCE)
        files = {file.name: str(file) for file in Path(folder).iterdir()}
        # config.json is uploaded after the others, so that a directory with it can be loaded.
        for name, file in sorted(files.items(), key=lambda item: item[0] == "config.json"):
            storage.upload_file(file, storage.join(uri, name))
        projector = weights_digest(model.projector.state_dict())
        write_checksums(uri, known={name: checksum(file) for name, file in files.items()}, projector=projector)
