"""LoRA in stage 2: low-rank matrices beside the language model's linear layers train instead of its weights.

Source: arXiv 2106.09685. Layers and file format are peft's; no other file imports peft.

Letters: W (out, in) a frozen weight, A (rank, in), B (out, rank).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from meteor import storage
from meteor.checkpoint.format import Checkpoint
from meteor.errors import SettingsError
from meteor.optional import import_optional

_ADAPTER = "default"


@dataclass(frozen=True)
class Lora:
    """Settings of LoRA: W becomes W + alpha / rank x B A, in training with dropout on A's input.

    Attributes:
        rank: rank of A and B.
        alpha: scale of the adapters' output, before division by the rank.
        dropout: dropout rate of A's input.
        seed: seed of A's initial values; B begins with zeros, so that the model is unchanged at first.
    """

    rank: int
    alpha: float
    dropout: float
    seed: int

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def add_lora(language_model: Any, lora: Lora) -> None:
    """Freeze the language model and add an adapter to each linear layer but the output layer.

    The adapters' initial values are equal on every worker, with and without ZeRO-3's sharding of the weights.

    Raises:
        SettingsError: the language model has no linear layers.
    """
    peft = _import_peft()
    targets = sorted({name.rpartition(".")[2] for name, _ in _linears(language_model)})
    if not targets:
        raise SettingsError(f"finetune.lora: {type(language_model).__name__} has no linear layers to adapt")
    torch.manual_seed(lora.seed)
    peft.inject_adapter_in_model(_config(lora, targets), language_model, adapter_name=_ADAPTER)


def _config(lora: Lora, targets: list[str]) -> Any:
    return _import_peft().LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _linears(language_model: Any) -> Iterator[tuple[str, nn.Linear]]:
    head = language_model.get_output_embeddings()
    for name, module in language_model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


def _adapted(language_model: nn.Module) -> list[tuple[str, Any]]:
    """List name and module of each layer with an adapter."""
    layers = _import_peft().tuners.lora.LoraLayer
    return [(name, module) for name, module in language_model.named_modules() if isinstance(module, layers)]


@torch.no_grad()
def merge_lora(language_model: nn.Module, checkpoint: Checkpoint, lora: Lora, *, prefix: str) -> None:
    """Merge the adapters into the weights and restore plain linear layers.

    The sum is computed in float32, from the checkpoint's master weights, and rounded once.

    Args:
        language_model: language model with adapters, on the CPU.
        checkpoint: checkpoint of the stage.
        lora: settings with which the adapters were added.
        prefix: prefix of the language model's names in the checkpoint.
    """
    for name, module in _adapted(language_model):
        a, b = _matrices(checkpoint, f"{prefix}{name}")
        base = module.get_base_layer()
        base.weight.copy_(base.weight.float() + lora.scale * (b @ a))
        parent, _, last = name.rpartition(".")
        setattr(language_model.get_submodule(parent), last, base)
    del language_model.peft_config


def write_adapter(language_model: Any, checkpoint: Checkpoint, lora: Lora, uri: str, *, prefix: str, base: str) -> None:
    """Write the adapters in peft's format, which ``PeftModel.from_pretrained(base model, folder)`` reads.

    Args:
        language_model: language model with adapters, whose names are used.
        checkpoint: checkpoint of the stage; its float32 master weights are written.
        lora: settings with which the adapters were added.
        uri: folder or s3:// prefix of the written files.
        prefix: prefix of the language model's names in the checkpoint.
        base: local directory or hub id of the language model.
    """
    tensors = {}
    names = [name for name, _ in _adapted(language_model)]
    for name in names:
        for letter, values in zip("AB", _matrices(checkpoint, f"{prefix}{name}"), strict=True):
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = values
    config = _config(lora, sorted({name.rpartition(".")[2] for name in names})).to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    storage.write_bytes(storage.join(uri, "adapter_model.safetensors"), save(tensors))
    storage.write_json(storage.join(uri, "adapter_config.json"), config)


def _matrices(checkpoint: Checkpoint, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (checkpoint.read("weights", f"{name}.lora_{letter}.{_ADAPTER}.weight") for letter in "AB")
    return a, b


def _import_peft() -> Any:
    return import_optional("peft", needed_for="finetune.lora", install="pip install peft")
