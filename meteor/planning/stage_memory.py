"""Check that a stage's memory fits its GPUs, and search for settings with which it would."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig

from meteor.assembly.language_model import find_way
from meteor.assembly.recipe import make_lora
from meteor.config import RunSettings, StageSettings
from meteor.data.table import SampleTable
from meteor.errors import SettingsError
from meteor.formatting import format_bytes, format_share, format_value
from meteor.planning.activations import LayerBytes, count_layer_bytes
from meteor.planning.memory import OVERHEAD_BYTES, MemoryEstimate, Setup, estimate_memory
from meteor.planning.sizes import BatchSizes, ModelSizes, find_model_sizes
from meteor.stages import TrainingStage
from meteor.train.build import DTYPES, read_llm_config
from meteor.train.lora import add_lora
from meteor.vision.encoder import read_vision_config

_LOG = logging.getLogger(__name__)
# An estimate above this share of a GPU's memory is called tight: allocators leave gaps that the arithmetic does not know.
_TIGHT = 0.9
# Limit of the search; more GPUs than this are not proposed.
_MAX_WORKERS = 64


def check_memory(settings: RunSettings, stage: TrainingStage, table: SampleTable) -> None:
    """Refuse a stage that will not fit its GPUs, before workers start.

    Raises:
        SettingsError: the stage will not fit; the message says which settings would.
    """
    memory = StageMemory.of(settings, stage, Needs.of(table))
    if not memory.fits:
        raise SettingsError(memory.problem())
    if memory.is_tight:
        _LOG.warning("%s: it will take %s of a GPU's memory; %s", stage, format_share(memory.share), memory.advice())


@dataclass(frozen=True)
class Needs:
    """Largest densities of a stage's samples, which decide about memory.

    Attributes:
        sub_images: sub-images per token of a row.
        answer_tokens: answer tokens per token of a row.
    """

    sub_images: float
    answer_tokens: float

    @classmethod
    def of(cls, table: SampleTable) -> "Needs":
        """Find the densest samples of a table, as a micro batch may hold nothing else."""
        sub_images = table.num_sub_images
        return cls(
            max(count / length for count, length in zip(sub_images, table.lengths, strict=True)),
            max(count / length for count, length in zip(table.answer_counts(), table.lengths, strict=True)),
        )


@dataclass(frozen=True)
class StageMemory:
    """A stage's estimated memory beside the memory of a GPU.

    Attributes:
        estimate: bytes by part.
        on_gpu: whether workers have GPUs.
        gpu_bytes: memory of a GPU; None if not known.
        remedies: overrides with which the stage fits, the mildest first; empty if it fits or nothing helps.
        keep_checkpoints: number of checkpoints that are kept.
    """

    estimate: MemoryEstimate
    on_gpu: bool
    gpu_bytes: float | None
    remedies: tuple[str, ...]
    keep_checkpoints: int

    @classmethod
    def of(cls, settings: RunSettings, stage: TrainingStage, needs: Needs) -> "StageMemory":
        estimator, gpu_bytes = _Estimator.of(settings, stage, needs), _gpu_bytes(settings)
        estimate = estimator.estimate(settings)
        remedies: tuple[str, ...] = ()
        if gpu_bytes is not None and estimate.gpu_total > _TIGHT * gpu_bytes:
            remedies = estimator.remedies(settings, gpu_bytes)
        on_gpu, keep = settings.runtime.gpus_per_worker > 0, settings.training(stage).keep_checkpoints
        return cls(estimate, on_gpu, gpu_bytes, remedies, keep)

    @property
    def share(self) -> float:
        return self.estimate.gpu_total / self.gpu_bytes if self.gpu_bytes else 0.0

    @property
    def fits(self) -> bool:
        return self.share <= 1

    @property
    def is_tight(self) -> bool:
        return self.share > _TIGHT

    def advice(self) -> str:
        if not self.remedies:
            return (
                "no settings tried here make it fit: use GPUs with more memory, a smaller language model, or in stage 2 "
                "adapters (finetune.lora={})"
            )
        return f"this would fit: {' '.join(self.remedies)}"

    def problem(self) -> str:
        assert self.gpu_bytes is not None
        return (
            f"it will not fit: it needs {format_bytes(self.estimate.gpu_total)} on a GPU, which has "
            f"{format_bytes(int(self.gpu_bytes))}; {self.advice()}"
        )

    def to_lines(self) -> list[str]:
        """Return lines that are aligned with the other lines of ``--dry-run``."""
        total = format_bytes(self.estimate.gpu_total)
        if not self.on_gpu:
            verdict = "on the CPU"
        elif self.gpu_bytes is None:
            verdict = "while the GPU's memory is not known: set runtime.gpu_memory_gb"
        else:
            word = "too much" if not self.fits else "tight" if self.is_tight else "fits"
            verdict = f"of {format_bytes(int(self.gpu_bytes))}, {word}"
        parts = [f"    {name:<28} {format_bytes(size):>8}" for name, size in self.estimate.gpu.items()]
        host = [f"    {name:<28} {format_bytes(size):>8}" for name, size in self.estimate.host.items()]
        checkpoints = self.keep_checkpoints * self.estimate.checkpoint
        return [
            f"  memory of a {'GPU   ' if self.on_gpu else 'worker'} {total} at the peak, {verdict}",
            *parts,
            *([f"  memory of a host   {format_bytes(self.estimate.host_total)} per worker", *host] if host else []),
            f"  a checkpoint       {format_bytes(self.estimate.checkpoint)}; the {self.keep_checkpoints} kept take "
            f"{format_bytes(checkpoints)}",
            *([f"  tight              {self.advice()}"] if self.fits and self.is_tight else []),
        ]


@dataclass(frozen=True)
class _Estimator:
    """Estimates of one stage's memory under different settings.

    Attributes:
        stage: the training stage.
        needs: densities of the stage's samples.
        llm: the language model's configuration.
        model: sizes of the model, which are equal for all settings that are tried.
        adapt: adds low-rank adapters to the language model, if the stage has them.
    """

    stage: TrainingStage
    needs: Needs
    llm: PretrainedConfig
    model: ModelSizes
    adapt: Callable[[Any], None]

    @classmethod
    def of(cls, settings: RunSettings, stage: TrainingStage, needs: Needs) -> "_Estimator":
        llm, lora = read_llm_config(settings.llm.path), make_lora(settings.training(stage))

        def adapt(language_model: Any) -> None:
            if lora is not None:
                add_lora(language_model, lora)

        model = find_model_sizes(
            llm,
            read_vision_config(settings.vision.path),
            {"name": settings.projector.name, **settings.projector.settings},
            stage,
            dtype=DTYPES[settings.llm.dtype],
            live=settings.training(stage).features == "live",
            adapt=adapt,
        )
        return cls(stage, needs, llm, model, adapt)

    def estimate(self, settings: RunSettings) -> MemoryEstimate:
        options, llm = settings.training(self.stage), settings.llm
        dtype, num_tokens = DTYPES[llm.dtype], options.micro_batch_size * options.max_length
        way = find_way(settings, self.stage, llm=self.llm)
        layers = _count(
            self.llm,
            dtype=dtype,
            rows=options.micro_batch_size,
            length=options.max_length,
            attention=way.attention,
            trained=self.stage == "finetune",
            packed=way.batching == "packed",
            adapt=self.adapt,
        )
        batch = BatchSizes(
            layers,
            num_sub_images=math.ceil(self.needs.sub_images * num_tokens),
            num_answer_tokens=math.ceil(self.needs.answer_tokens * num_tokens),
        )
        setup = Setup(
            num_workers=settings.runtime.num_workers,
            zero_stage=options.zero_stage,
            element_bytes=dtype.itemsize,
            checkpointing=llm.gradient_checkpointing,
            overhead_bytes=OVERHEAD_BYTES if settings.runtime.gpus_per_worker else 0,
            **_offloads(options),
        )
        return estimate_memory(self.model, batch, setup)

    def remedies(self, settings: RunSettings, gpu_bytes: float) -> tuple[str, ...]:
        """Find overrides with which the stage fits and is not tight.

        Changes are added one after the other, those that cost least speed first, until it fits. Then each change that turns
        out not to be needed is dropped.
        """
        changes: dict[str, Any] = {}
        for name, value in _changes(settings, self.stage):
            changes[name] = value
            if self._fits(settings, changes, gpu_bytes):
                break
        else:
            return ()
        for name in list(changes):
            without = {other: value for other, value in changes.items() if other != name}
            if self._fits(settings, without, gpu_bytes):
                changes = without
        return tuple(f"{name}={format_value(value)}" for name, value in changes.items())

    def _fits(self, settings: RunSettings, changes: dict[str, Any], gpu_bytes: float) -> bool:
        changed = _override(settings, changes)
        options = changed.training(self.stage)
        offloads = _offloads(options)
        # DeepSpeed offloads the optimiser from ZeRO stage 1 on, and parameters in stage 3.
        if (any(offloads.values()) and options.zero_stage == 0) or (
            offloads["offload_param"] and options.zero_stage != 3
        ):
            return False
        return self.estimate(changed).gpu_total <= _TIGHT * gpu_bytes


def _count(llm: PretrainedConfig, **options: Any) -> LayerBytes:
    """Count what a layer keeps; if the architecture resists, count a Llama of its size, so that it can train anyway."""
    try:
        return count_layer_bytes(llm, **options)
    except Exception as error:  # noqa: BLE001  (each class of transformers stumbles in its own way)
        _LOG.warning("activations of %s cannot be counted (%s); those of a Llama count", type(llm).__name__, error)
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    sizes = {name: value for name in names if (value := getattr(llm, name, None)) is not None}
    llama = LlamaConfig(**sizes, intermediate_size=getattr(llm, "intermediate_size", None) or 4 * llm.hidden_size)
    return count_layer_bytes(llama, **options)


def _gpu_bytes(settings: RunSettings) -> float | None:
    runtime = settings.runtime
    if not runtime.gpus_per_worker:
        return None
    if runtime.gpu_memory_gb is not None:
        return runtime.gpu_memory_gb * 1e9
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return None


def _override(settings: RunSettings, changes: dict[str, Any]) -> RunSettings:
    content = settings.model_dump()
    for dotted, value in changes.items():
        part, name = dotted.split(".")
        content[part][name] = value
    return RunSettings.model_validate(content)


def _offloads(options: StageSettings) -> dict[str, bool]:
    zero = options.deepspeed.get("zero_optimization", {})
    return {name: zero.get(name, {}).get("device") == "cpu" for name in ("offload_optimizer", "offload_param")}


def _changes(settings: RunSettings, stage: TrainingStage) -> Iterator[tuple[str, Any]]:
    """Yield (name of a setting, value) in the order in which they cost speed, the cheapest first."""
    options = settings.training(stage)
    if not settings.llm.gradient_checkpointing:
        yield "llm.gradient_checkpointing", True
    size = options.micro_batch_size
    while size > 1:
        size //= 2
        yield f"{stage}.micro_batch_size", size
    for zero_stage in range(max(options.zero_stage + 1, 2), 4):
        yield f"{stage}.zero_stage", zero_stage
    zero = options.deepspeed.get("zero_optimization", {})
    for name in ("offload_optimizer", "offload_param"):
        zero = {**zero, name: {"device": "cpu"}}
        yield f"{stage}.deepspeed", {**options.deepspeed, "zero_optimization": zero}
    num_workers = settings.runtime.num_workers
    while num_workers < _MAX_WORKERS:
        num_workers *= 2
        yield "runtime.num_workers", num_workers
