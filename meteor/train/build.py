"""Assembly of a stage's model: language model, projector, and the choice of trained parameters."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from meteor.errors import CheckpointError, SettingsError
from meteor.model import MeteorConfig, MeteorForConditionalGeneration
from meteor.model.language_model import remove_dropout, set_attention
from meteor.model.trained_projector import projector_metadata
from meteor.pretrained import load_pretrained, local_model, read_config
from meteor.projector.file import load_weights, read_projector_file
from meteor.stages import TrainingStage

# Blocks per file, and bytes per block, that enter a language model's fingerprint.
_NUM_SAMPLED_BLOCKS, _BLOCK_BYTES = 1024, 1 << 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_model(
    *,
    llm_path: str,
    vision_config: PretrainedConfig,
    projector: dict[str, Any],
    select_layer: int,
    cache_identity: dict[str, Any],
    dtype: torch.dtype,
    seed: int,
    attention: str | None = None,
    text_sampler: dict[str, Any] | None = None,
    image_token_id: int,
) -> MeteorForConditionalGeneration:
    """Build a model with pretrained language model and new projector, without vision tower (training reads features).

    Args:
        llm_path: local directory, s3:// folder or hub id of any Hugging Face causal LM.
        vision_config: configuration of the encoder, for its width and for the finished model.
        projector: ``{"name": ..., **settings}`` of the projector.
        select_layer: index of the encoder's hidden state that the features come from.
        cache_identity: identity of the feature caches that the model may read.
        dtype: dtype of all weights.
        seed: seed of the projector's initial weights.
        attention: attention of the language model, a member of `meteor.model.attention.IMPLEMENTATIONS`; None for
            transformers' own choice.
        text_sampler: ``{"layer": ..., "keep": ...}`` of `meteor.model.text_sampler.TextSampler`, with None for the middle
            layer; None for no sampler.
        image_token_id: id of ``<image>``; the embedding needs no row for it in training.
    """
    language_model = load_llm(llm_path, dtype)
    config = MeteorConfig(
        text_config=language_model.config,
        vision_config=vision_config,
        projector=projector,
        select_layer=select_layer,
        cache_identity=cache_identity,
        text_sampler=text_sampler and _with_layer(text_sampler, language_model.config.num_hidden_layers),
        image_token_id=image_token_id,
    )
    torch.manual_seed(seed)
    model = MeteorForConditionalGeneration(config, vision_tower=False, language_model=language_model)
    model.projector.to(dtype)
    remove_dropout(model.language_model)
    if attention is not None:
        set_attention(model.language_model, attention)
    return model


def _with_layer(text_sampler: dict[str, Any], num_layers: int) -> dict[str, Any]:
    layer = text_sampler["layer"]
    # With two layers the middle is the last layer, after which no layer would profit from the sampler.
    return {**text_sampler, "layer": min(num_layers // 2, num_layers - 2) if layer is None else layer}


def read_llm_config(path: str) -> PretrainedConfig:
    """Read a language model's configuration from a local directory, an s3:// folder or a hub id.

    Raises:
        SettingsError: see `meteor.pretrained.read_config`.
    """
    return read_config(path, setting="llm.path", example="lmsys/vicuna-7b-v1.5")


def load_llm(path: str, dtype: torch.dtype) -> Any:
    """Load a causal LM from a local directory, an s3:// folder or a hub id, without running code of its repository.

    Raises:
        SettingsError: there is no model, or its weights are incomplete.
    """
    return load_pretrained(
        AutoModelForCausalLM,
        path,
        setting="llm.path",
        example="lmsys/vicuna-7b-v1.5",
        dtype=dtype,
        # Every model has it; `build_model` sets another.
        attn_implementation="eager",
    )


def freeze_for(model: MeteorForConditionalGeneration, stage: TrainingStage) -> None:
    """Freeze all but the projector in stage 1; in stage 2 the language model trains too (paper, section 4.1)."""
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    if stage == "finetune":
        model.language_model.requires_grad_(True)


def checkpoint_activations(model: MeteorForConditionalGeneration) -> None:
    """Recompute the language model's activations in the backward pass, layer by layer."""
    language_model = model.language_model
    # transformers renames this method between 5.17 and 6, and warns about the old name.
    enable = getattr(language_model, "activation_checkpointing_enable", language_model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model.train()


def compile_layers(model: MeteorForConditionalGeneration, *, zero_stage: int, backend: Any = "inductor") -> None:
    """Compile each decoder layer with `torch.compile`; a single graph serves all layers and any number of tokens.

    Layers are compiled one by one, not the model as a whole. Checkpointing works layer by layer too, compiling takes a
    fraction of the time, and code that depends on a batch's values (places of visual slots, lengths of samples) stays
    outside the graph.

    Args:
        model: the model, after `checkpoint_activations` if that is wanted.
        zero_stage: ZeRO stage of the engine that will train.
        backend: backend of `torch.compile`.

    Raises:
        SettingsError: the stage is ZeRO-3 (its hooks gather weights inside the layers), the model has a text-guided sampler,
            or the language model's layers are not transformers' own.
    """
    if model.text_sampler is not None:
        raise SettingsError(
            "llm.compile=true and finetune.text_sampler exclude each other: the sampler's hooks read values"
        )
    if zero_stage == 3:
        raise SettingsError(
            "llm.compile=true needs zero_stage 0 to 2: ZeRO-3 gathers weights by hooks inside the layers"
        )
    layers = [module for module in model.language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise SettingsError(f"llm.compile=true: {type(model.language_model).__name__} has no decoder layers to compile")
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)


def llm_fingerprint(path: str) -> str:
    """Return a quick identity of a language model: names and sizes of its files, and 1,024 blocks of 64 KiB from each.

    Hashing 26 GB at every start would take minutes. The blocks are evenly spaced, at most 10 MB apart in the usual files of
    10 GB. Part of every large matrix is therefore read, and a copy with only some tuned matrices gets another identity. Files
    up to 64 MiB are read whole. A hub id is identified by its commit.
    """
    folder = Path(local_model(path))
    if not folder.is_dir():
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        return hashlib.sha256(f"{path}@{getattr(config, '_commit_hash', None)}".encode()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in {".safetensors", ".bin", ".json", ".model"} and file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                for start in range(0, size, max(size // _NUM_SAMPLED_BLOCKS, _BLOCK_BYTES)):
                    stream.seek(start)
                    digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def load_projector(model: MeteorForConditionalGeneration, uri: str) -> None:
    """Load stage 1's projector into a model; for arguments and errors see `read_fitting_projector`."""
    load_weights(model.projector, read_fitting_projector(model.config, uri), uri)


def read_fitting_projector(config: MeteorConfig, uri: str) -> dict[str, torch.Tensor]:
    """Read stage 1's projector after a check that it belongs to this model.

    Args:
        config: configuration of the model with the settings of this run.
        uri: ``projector.safetensors`` of a pretrain stage.

    Returns:
        The weights by name.

    Raises:
        CheckpointError: the projector was trained with other settings; the message names the differences.
    """
    stored, weights = read_projector_file(uri)
    wanted = projector_metadata(config)
    differing = [
        f"{name}: {stored.get(name)!r} there, {wanted[name]!r} here"
        for name in wanted
        if stored.get(name) != wanted[name]
    ]
    if differing:
        raise CheckpointError(f"{uri} does not fit this run: {'; '.join(differing)}. Run pretrain with these settings")
    return weights
