"""Stages 1 and 2 on the driver: pin the data, plan the samples, run the workers, record the results."""

import logging
from functools import partial
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from meteor import storage
from meteor.assembly import Inputs
from meteor.assembly.features import uris_by_key
from meteor.assembly.language_model import check_max_length, find_way
from meteor.assembly.sample_tables import plan_held_out, plan_samples
from meteor.assembly.training_stage import PreparedStage, check_stage, check_token_ids, prepare
from meteor.checkpoint.folder import best_checkpoint, complete_checkpoints, problems_of_damaged
from meteor.checkpoint.format import Checkpoint
from meteor.config import RunSettings, mathematical_settings
from meteor.data.table_plan import TablePlan
from meteor.errors import TrainingError
from meteor.planning.stage_memory import check_memory
from meteor.planning.steps import num_steps
from meteor.planning.workers import training_request
from meteor.runs.folder import Summary
from meteor.runs.metrics import read_last
from meteor.runs.mlflow_log import StageLog
from meteor.runs.pins import hold_pin
from meteor.runs.reading import read_stage
from meteor.stages import TrainingStage
from meteor.text.tokenizer import find_visual_tokens
from pipelines.command import timed
from pipelines.ray_parts.log_to_mlflow import LogToMlflow
from pipelines.ray_parts.resources import wait_for_nodes
from pipelines.ray_parts.runtime import job_id, progress, worker_environment
from pipelines.ray_parts.tracked import reuse, tracked
from pipelines.ray_parts.worker import WorkerTask, train_worker

_LOG = logging.getLogger(__name__)


def run_stage(inputs: Inputs, *, stage: TrainingStage) -> Summary:
    """Train a stage, or resume it, or return the summary if it has finished.

    Raises:
        SettingsError: the stage will not fit into the memory of the GPUs.
        CheckpointError: ``finetune.pretrained`` was trained with other settings.
        TrainingError: the workers failed more often than ``runtime.max_failures``.
    """
    with timed() as seconds:
        settings, prepared = inputs.settings, prepare(inputs, stage)
        folder = prepared.folder
        finished = folder.finished()
        if finished:
            return reuse(settings, folder, finished)
        check_stage(inputs, stage)
        check_max_length(settings, stage)
        way = find_way(settings, stage)
        plan, held_out = plan_samples(inputs, prepared), plan_held_out(inputs, prepared)
        check_token_ids(inputs, plan, held_out)
        check_memory(settings, stage, plan.table)
        # A start that is refused, for example for images that cache_features has yet to encode, must not bind the next one.
        cache = hold_pin(settings, prepared.identity, prepared.cache.uri)
        folder.start(
            settings,
            job=job_id(),
            pin=vars(prepared.versions),
            parent=prepared.parent,
            cache=prepared.cache.uri,
            cache_key=cache.identity.key,
        )
        plan.table.write(storage.join(folder.uri, "samples.parquet"))
        if held_out is not None:
            held_out.table.write(storage.join(folder.uri, "held_out.parquet"))
        storage.write_json(storage.join(folder.uri, "excluded.json"), [vars(sample) for sample in plan.excluded])
        task = _task(inputs, prepared, has_held_out=held_out is not None)
        params = {stage: mathematical_settings(settings.training(stage)), **_shared_params(settings)}
        with tracked(settings, folder, params) as log:
            log.cache(cache, context="training")
            for file in prepared.sets:
                log.dataset(name=file.name, digest=file.digest, source=file.uri, context="samples")
            steps = num_steps(settings.training(stage), plan.table)
            _LOG.info("[%s] %s: %s", settings.name, stage, way.text)
            _LOG.info("[%s] %s: %d samples, %d steps, run %s", settings.name, stage, len(plan.table), steps, folder.uri)
            _run_workers(settings, task, log, steps)
            folder.claim.check()
            summary = _summary(task, plan, steps, seconds())
            log.tag("meteor.result", task.result_uri)
        return folder.finish(summary)


def _shared_params(settings: RunSettings) -> dict[str, Any]:
    names = ("slicing", "vision", "projector", "llm", "cache")
    return {name: mathematical_settings(getattr(settings, name)) for name in names}


def _task(inputs: Inputs, prepared: PreparedStage, *, has_held_out: bool) -> WorkerTask:
    settings, stage, tokenizer = inputs.settings, prepared.stage, inputs.tokenizer()
    live = settings.training(stage).features == "live"
    return WorkerTask(
        settings=settings,
        stage=stage,
        run_uri=prepared.folder.uri,
        claim=prepared.folder.claim,
        index_digest=prepared.versions.index_digest,
        cache_uri=prepared.cache.uri,
        cache_version=prepared.versions.cache_version,
        cache_identity=prepared.cache.identity.to_dict(),
        visual_tokens=find_visual_tokens(tokenizer),
        pad_id=tokenizer.pad_token_id,
        projector_uri=prepared.parent["uri"] if prepared.parent else None,
        image_uris=uris_by_key(prepared.index.rows()) if live else {},
        has_held_out=has_held_out,
    )


def _run_workers(settings: RunSettings, task: WorkerTask, log: StageLog, num_steps: int) -> None:
    runtime = settings.runtime
    # Every start gets a new name, as Ray Train does nothing for a name that it knows as finished or failed.
    name = f"{task.stage}-{task.run_uri[-12:]}-{task.claim.number}"
    trainer = _Trainer(
        # The task is bound to the function. As a `train_loop_config` it would reach the controller too, which would then import
        # everything that a worker imports.
        partial(train_worker, task),
        scaling_config=ScalingConfig(
            num_workers=runtime.num_workers,
            use_gpu=runtime.gpus_per_worker > 0,
            resources_per_worker=_resources(runtime.cpus_per_worker, runtime.gpus_per_worker),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage.join(settings.output, "ray_train"),
            failure_config=FailureConfig(max_failures=runtime.max_failures),
            callbacks=[LogToMlflow(log)],
            worker_runtime_env={"env_vars": worker_environment(runtime.gpus_per_worker)},
        ),
    )
    watch = _Watch(task)
    label, workers = f"[{settings.name}] {task.stage}", training_request(runtime)
    wait_for_nodes(workers, runtime)
    starting = f"{label}: starting {workers.to_text()}"
    with progress(f"{label}: step", num_steps, watch.steps_done, detail=watch.detail, starting=starting):
        try:
            trainer.fit()
            watch.warn_of_damage()
        # RayActorError means that the controller itself has died.
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            task.claim.check()
            raise TrainingError(
                f"{task.stage} failed. Run this command again to resume it from its last checkpoint in {task.run_uri}. "
                f"Cause: {error}"
            ) from error


class _Trainer(TorchTrainer):
    """Trainer that leaves SIGINT to `meteor.stopping`; Ray's own handler would exit with status 0, without a word."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Set no handler."""


class _Watch:
    """The driver's view of a stage's workers: their last row of metrics, and checkpoints that they found damaged."""

    def __init__(self, task: WorkerTask) -> None:
        self._run_uri, self._epochs = task.run_uri, task.stage_settings.epochs
        self._checkpoints = storage.join(task.run_uri, "checkpoints")
        self._known = problems_of_damaged(self._checkpoints)
        self._last = read_last(self._run_uri)
        self._has_begun = False

    def steps_done(self) -> int:
        """Return the number of finished steps."""
        row = read_last(self._run_uri)
        if row != self._last and not self._has_begun:
            self._has_begun = True
            # Workers look for damage before their first step.
            self.warn_of_damage()
        self._last = row
        return int(row["step"]) if row else 0

    def detail(self) -> str:
        """Return text about the last row, for progress lines."""
        return (
            f"; epoch {self._last['epoch']:.2f} of {self._epochs}, loss {self._last['loss']:.4f}" if self._last else ""
        )

    def warn_of_damage(self) -> None:
        """Say which checkpoints the workers passed over."""
        found = problems_of_damaged(self._checkpoints)
        for record in found.keys() - self._known.keys():
            _LOG.warning("%s. Training goes on from the checkpoint before it, if there is one", found[record])
        self._known = found


def _resources(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def _summary(task: WorkerTask, plan: TablePlan, num_steps: int, seconds: float) -> Summary:
    rows = read_stage(task.run_uri).metrics
    busy_s = sum(row["seconds"] for row in rows)
    totals = plan.table.totals()
    counts: dict[str, Any] = {
        "samples": totals["samples"],
        "excluded": len(plan.excluded),
        "cut": plan.num_cut,
        "steps": num_steps,
        "loss_first": rows[0]["loss"],
        "loss_last": rows[-1]["loss"],
        "visual_tokens": totals["visual_tokens"],
        "text_tokens": totals["text_tokens"],
        "samples_per_s": sum(row["num_samples"] for row in rows) / busy_s,
    }
    checkpoints = storage.join(task.run_uri, "checkpoints")
    best = best_checkpoint(checkpoints)
    if best is not None:
        state = Checkpoint(best).state
        counts |= {"best_held_out_loss": state["held_out_loss"], "best_checkpoint_step": state["step"]}
    kind = "projector" if task.stage == "pretrain" else "model"
    extra = {"training_seconds": busy_s, "excluded_reasons": plan.reasons(), "totals": totals}
    extra["metrics"] = Checkpoint(complete_checkpoints(checkpoints)[-1]).state["metrics"]
    return Summary(task.stage, counts, seconds, {kind: task.result_uri, "run": task.run_uri}, extra=extra)
