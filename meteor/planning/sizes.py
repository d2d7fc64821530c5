"""Sizes of a stage's model and micro batches, found without weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from meteor.model import MeteorConfig, MeteorForConditionalGeneration
from meteor.planning.activations import LayerBytes, count_saved_bytes
from meteor.projector import build_projector
from meteor.stages import TrainingStage
from meteor.train.build import freeze_for
from meteor.vision.towers import TowerShape, build_tower


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a stage's model.

    Attributes:
        trained, frozen: parameters of language model and projector that are trained, and that are not.
        encoder: parameters of the live encoder; 0 with cached features.
        num_layers: decoder layers of the language model.
        sub_image_bytes: bytes that the projector keeps per sub-image, features included.
        width, vocabulary: input and output width of the output layer.
        head_trained: whether the output layer is trained.
    """

    trained: int
    frozen: int
    encoder: int
    num_layers: int
    sub_image_bytes: int
    width: int
    vocabulary: int
    head_trained: bool


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of the largest micro batch to be expected.

    Attributes:
        layers: bytes that the language model keeps.
        num_sub_images, num_answer_tokens: totals over the micro batch's samples.
    """

    layers: LayerBytes
    num_sub_images: int
    num_answer_tokens: int


def find_model_sizes(
    llm: PretrainedConfig,
    vision: PretrainedConfig,
    projector: dict[str, Any],
    stage: TrainingStage,
    *,
    dtype: torch.dtype,
    live: bool,
    adapt: Callable[[Any], None] = lambda model: None,
) -> ModelSizes:
    """Find the sizes of a stage's model on the meta device.

    Only the projector is built with real weights, on the CPU, to count the bytes that it keeps per sub-image. A GPU's kernels
    keep fewer.

    Args:
        llm, vision: configurations of language model and encoder.
        projector: ``{"name": ..., **settings}``.
        stage: the training stage.
        dtype: type of weights and activations.
        live: whether the encoder runs in the worker.
        adapt: change of the language model before it trains, for example `meteor.train.lora.add_lora`.
    """
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(llm)
        config = MeteorConfig(text_config=llm, vision_config=vision, projector=projector)
        model = MeteorForConditionalGeneration(config, vision_tower=False, language_model=language_model)
        num_encoder = sum(weight.numel() for weight in build_tower(vision).parameters()) if live else 0
        freeze_for(model, stage)
        adapt(language_model)
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return ModelSizes(
        trained=counts[True],
        frozen=counts[False],
        encoder=num_encoder,
        num_layers=llm.num_hidden_layers,
        sub_image_bytes=_sub_image_bytes(projector, vision, llm.hidden_size, dtype),
        width=llm.hidden_size,
        vocabulary=llm.vocab_size,
        head_trained=language_model.get_output_embeddings().weight.requires_grad,
    )


def _sub_image_bytes(projector: dict[str, Any], vision: PretrainedConfig, llm_width: int, dtype: torch.dtype) -> int:
    side, width = TowerShape.of(vision).grid_side, vision.hidden_size
    module = build_projector(**projector, vision_width=width, llm_width=llm_width).to(dtype)
    features_1PC, attention_1P = torch.randn(1, side * side, width, dtype=dtype), torch.rand(1, side * side)
    grids_12 = torch.tensor([[side, side]])
    given = [*module.parameters(), *module.buffers(), features_1PC, attention_1P]
    saved = count_saved_bytes(lambda: module(features_1PC, attention_1P, grids_12), given)
    return saved + features_1PC.numel() * dtype.itemsize
