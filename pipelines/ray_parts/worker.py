"""Work inside a Ray Train worker: build the model, resume, train, write the result."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import torch

from meteor import storage
from meteor.assembly import make_lora, make_recipe, pixel_settings
from meteor.assembly.features import open_features
from meteor.assembly.language_model import find_way
from meteor.cache import CacheIdentity
from meteor.checkpoint.folder import complete_checkpoints
from meteor.checkpoint.format import Checkpoint
from meteor.config import FinetuneSettings, RunSettings, StageSettings
from meteor.data.collate import Batch, collate
from meteor.data.table import SampleTable
from meteor.errors import FailedStepError, SupersededError, TrainingError
from meteor.image.budget import visual_token_budget
from meteor.image.elastic import token_counts
from meteor.model import MeteorForConditionalGeneration, MeteorImageProcessor, MeteorProcessor
from meteor.runs.claim import Claim
from meteor.stages import TrainingStage
from meteor.text.tokenizer import VisualTokens, load_tokenizer
from meteor.train.build import DTYPES, build_model, checkpoint_activations, compile_layers, freeze_for, load_projector
from meteor.train.checkpoints import newest_sound_checkpoint
from meteor.train.engine import loading_for, make_engine
from meteor.train.export import export_adapter, export_model, export_projector
from meteor.train.flops import ModelFlops, peak_flops
from meteor.train.held_out import held_out_loss
from meteor.train.loading import load_batches
from meteor.train.loop import train
from meteor.train.lora import Lora, add_lora
from meteor.train.plan import Recipe, StepPlan
from meteor.train.protocol import Engine, on_first_worker
from meteor.train.row_check import check_rows
from meteor.vision.encoder import FrozenEncoder, read_vision_config
from pipelines.ray_parts.live_metrics import LiveMetrics
from pipelines.ray_parts.logs import configure_worker_logging
from pipelines.ray_parts.reporter import Reporter

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerTask:
    """Arguments of a training worker, made on the driver; they are small and contain no secrets."""

    settings: RunSettings
    stage: TrainingStage
    run_uri: str
    claim: Claim
    index_digest: str
    cache_uri: str
    cache_version: int
    cache_identity: dict[str, Any]
    visual_tokens: VisualTokens
    pad_id: int
    projector_uri: str | None
    image_uris: dict[str, str]
    has_held_out: bool

    @property
    def stage_settings(self) -> StageSettings:
        return self.settings.training(self.stage)

    @property
    def projector(self) -> dict[str, Any]:
        return {"name": self.settings.projector.name, **self.settings.projector.settings}

    @property
    def lora(self) -> Lora | None:
        return make_lora(self.stage_settings)

    @property
    def result_uri(self) -> str:
        """URI of the stage's result: a projector file in stage 1, a model directory in stage 2."""
        model = storage.join(self.run_uri, "model")
        return storage.join(model, "projector.safetensors") if self.stage == "pretrain" else model


def train_worker(task: WorkerTask) -> None:
    """Train a stage in a worker; the entry point for `ray.train.torch.TorchTrainer`.

    If a newer start of the stage takes over, the worker ends without an error, as Ray Train would start it again after one. The
    driver then notices the newer start too.
    """
    try:
        _train_worker(task)
    except SupersededError as error:
        _LOG.warning("%s", error)


def _train_worker(task: WorkerTask) -> None:
    configure_worker_logging(
        run=task.settings.name,
        stage=task.stage,
        digest=task.run_uri[-12:],
        rank=ray.train.get_context().get_world_rank(),
    )
    settings, stage = task.settings, task.stage_settings
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(int(settings.runtime.cpus_per_worker), 1))
    table = SampleTable.read(storage.join(task.run_uri, "samples.parquet"))
    load_from = _batch_loader(task, str(device))
    loader = partial(load_from, table=table)
    dtype = DTYPES[settings.llm.dtype]
    with loading_for(zero_stage=stage.zero_stage, dtype=dtype, options=stage.deepspeed):
        way = find_way(settings, task.stage, device=device)
        model = _build(task, attention=way.attention)
    claim = on_first_worker(task.claim.for_workers)
    checkpoints = storage.join(task.run_uri, "checkpoints")
    resumed = newest_sound_checkpoint(checkpoints)
    recipe = make_recipe(
        stage,
        _native_weight_full(model),
        way.batching,
        token_counts(settings.projector.name, settings.projector.settings),
    )
    plan = StepPlan(table, recipe, task.index_digest)
    start_step = resumed.state["step"] if resumed else 0
    if start_step < plan.num_steps:
        [empty] = loader([([], None)])
        engine = make_engine(
            model,
            zero_stage=stage.zero_stage,
            dtype=dtype,
            device=device,
            max_grad_norm=stage.max_grad_norm,
            empty_inputs=empty.to(device).as_inputs(),
            checkpoint=resumed,
            options=stage.deepspeed,
        )
        check_rows(
            engine,
            loader.keywords["collate"],
            packs=way.batching == "packed",
            vocab_size=model.config.text_config.vocab_size,
            dtype=dtype,
        )
        live = LiveMetrics(settings.name, task.stage, task.run_uri[-12:])
        reporter = Reporter(live, task.run_uri, claim, resumed, engine.rank)
        try:
            train(
                engine,
                plan,
                recipe,
                load_batches=loader,
                checkpoints=checkpoints,
                start_step=start_step,
                on_step=reporter,
                store=reporter.store,
                is_owner=claim.is_current,
                meet=reporter.meet,
                evaluate=partial(_evaluate, task, engine, recipe, load_from),
                flops=_flops(model, device, settings.runtime.peak_tflops),
            )
        except FailedStepError as error:
            reporter.write()  # the loss before the failed step helps to find the cause
            raise write_failure(error, task.run_uri) from error
    # Other workers end here. If they waited in a collective, its timeout would end a slow export of a large model.
    if ray.train.get_context().get_world_rank() == 0:
        claim.check()
        export(task, complete_checkpoints(checkpoints)[-1])


def _evaluate(task: WorkerTask, engine: Engine, recipe: Recipe, load_from: Callable[..., Any]) -> dict[str, float]:
    if not task.has_held_out:
        return {}
    table = SampleTable.read(storage.join(task.run_uri, "held_out.parquet"))
    return {"held_out_loss": held_out_loss(engine, table, recipe, load_batches=partial(load_from, table=table))}


def write_failure(error: FailedStepError, run_uri: str) -> TrainingError:
    """Write the samples of a failed step to the stage's folder; return an error that names the file.

    All workers that fail write the same file: the error of the first worker ends the others.
    """
    uri = storage.join(run_uri, "failures", f"step_{error.failure['step']:08d}.json")
    storage.write_json(uri, error.failure)
    return TrainingError(f"{error} The samples of the step's global batch are in {uri}")


def _flops(model: MeteorForConditionalGeneration, device: torch.device, peak_tflops: float | None) -> ModelFlops | None:
    """Return the model's FLOPs beside the device's peak; None if the peak is neither set nor known."""
    if peak_tflops is not None:
        return ModelFlops.of(model, peak_tflops * 1e12)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if peak is None else ModelFlops.of(model, peak)


def _native_weight_full(model: MeteorForConditionalGeneration) -> float | None:
    """Return the weight of the native expert after its warm-up; None for projectors without this expert."""
    projector = model.projector.settings
    return 1.0 - projector["visual_weight"] if projector.get("experts") == "visual_native" else None


def export(task: WorkerTask, checkpoint_uri: str) -> None:
    """Write the stage's result from its last checkpoint, on the CPU."""
    model, checkpoint = _build(task), Checkpoint(checkpoint_uri)
    if task.stage == "pretrain":
        export_projector(model, checkpoint, task.result_uri)
        return
    vision = task.settings.vision
    encoder = FrozenEncoder.from_pretrained(vision.path, select_layer=vision.select_layer, importance=vision.importance)
    image_processor = MeteorImageProcessor(
        **vars(pixel_settings(task.settings)),
        image_mean=encoder.mean,
        image_std=encoder.std,
        sub_images=task.stage_settings.sub_images,
    )
    processor = MeteorProcessor(
        image_processor,
        load_tokenizer(task.settings.llm.path),
        projector=task.projector,
        # The model asks as it was taught.
        template=task.stage_settings.template,
        text_sampler=_text_sampler(task) is not None,
    )
    if task.lora is not None:
        export_adapter(model, checkpoint, task.lora, task.settings.llm.path, storage.join(task.result_uri, "adapter"))
    export_model(
        model, checkpoint, encoder, processor, task.result_uri, DTYPES[task.settings.llm.dtype], lora=task.lora
    )


def _build(task: WorkerTask, *, attention: str | None = None) -> MeteorForConditionalGeneration:
    """Build the stage's model with the weights that it starts from; with ``attention`` it is ready to be trained."""
    settings = task.settings
    model = build_model(
        llm_path=settings.llm.path,
        vision_config=read_vision_config(settings.vision.path),
        projector=task.projector,
        select_layer=settings.vision.select_layer,
        cache_identity=task.cache_identity,
        dtype=DTYPES[settings.llm.dtype],
        seed=task.stage_settings.seed,
        attention=attention,
        text_sampler=_text_sampler(task),
        image_token_id=task.visual_tokens.image_id,
    )
    if task.projector_uri is not None:
        load_projector(model, task.projector_uri)
    freeze_for(model, task.stage)
    if task.lora is not None:
        add_lora(model.language_model, task.lora)
    if attention and settings.llm.gradient_checkpointing:
        checkpoint_activations(model)
    if attention and settings.llm.compile:
        compile_layers(model, zero_stage=task.stage_settings.zero_stage)
    return model


def _text_sampler(task: WorkerTask) -> dict[str, Any] | None:
    stage = task.stage_settings
    if not isinstance(stage, FinetuneSettings) or stage.text_sampler is None:
        return None
    return stage.text_sampler.model_dump()


def _batch_loader(task: WorkerTask, device: str) -> Callable[..., Any]:
    """Return `load_batches` with every argument except the table."""
    settings, stage = task.settings, task.stage_settings
    source = open_features(
        settings,
        stage.features,
        cache=task.cache_uri,
        version=task.cache_version,
        uris=task.image_uris,
        device=device,
    )
    if stage.features == "cache":
        source.identity.require_match(CacheIdentity.from_dict(task.cache_identity))  # type: ignore[union-attr]
    projector = settings.projector
    width = read_vision_config(settings.vision.path).hidden_size

    def collate_rows(rows: Any, k: int | None = None) -> Batch:
        return collate(
            rows,
            budget=visual_token_budget(projector.name, projector.settings, k=k),
            visual_tokens=task.visual_tokens,
            pad_id=task.pad_id,
            vision_width=width,
            select_layer=settings.vision.select_layer,
            sub_images=stage.sub_images,
        )

    return partial(
        load_batches,
        source=source,
        collate=collate_rows,
        num_threads=settings.cache.prefetch_threads,
        max_bytes=settings.cache.prefetch_mb << 20,
    )
