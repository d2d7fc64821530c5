"""Stages 1 and 2 on the driver: pin the data, plan the samples, run the workers, record what came out."""

import logging
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from meteor import storage
from meteor.assembly import cache_identity, cache_uri, index_uri, load_encoder, pixel_settings
from meteor.cache import CacheIdentity, DatasetIndex, FeatureCache
from meteor.cache.manifest import latest_manifest
from meteor.config import RunSettings, StageSettings, mathematical_settings, settings_digest
from meteor.data.samples import Sample
from meteor.data.table import SampleTable, TablePlan, plan_table
from meteor.errors import CacheError, NotFoundError, QuarantineLimitError, SettingsError, TrainingError
from meteor.image.budget import visual_token_budget
from meteor.report.data import read_stage_run
from meteor.text.tokens import TokenisedSample, load_tokenizer, tokenise, visual_separators
from meteor.train.build import Stage, llm_fingerprint
from pipelines.inputs import SampleSet, indexed_images, load_set, quarantine_into, uris_by_key
from pipelines.metrics import read_last
from pipelines.runtime import progress, worker_environment
from pipelines.stage import StageRun, Summary, canonical, timed
from pipelines.stage_log import StageLog
from pipelines.worker import WorkerTask, train_worker

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pin:
    """What a run read at its first start, and reads for ever: index and cache may grow meanwhile."""

    run_digest: str
    index_version: int
    index_digest: str
    cache_version: int


@dataclass(frozen=True)
class Prepared:
    """A stage before its workers start."""

    run: StageRun
    pin: Pin
    pin_uri: str
    identity: CacheIdentity
    samples: SampleSet
    index: DatasetIndex
    parent: dict[str, str] | None


def stage_settings(settings: RunSettings, stage: Stage) -> StageSettings:
    return settings.pretrain if stage == "pretrain" else settings.finetune


def prepare(settings: RunSettings, stage: Stage) -> Prepared:
    """Find or make the pin and with it the run: its digest is over settings, samples, pictures, and the parent's digest.

    Raises:
        SettingsError: the stage has no samples, or stage 2 no stage 1.
        CacheError: cache_features has not run.
    """
    uri = getattr(settings.data, stage)
    if uri is None:
        raise SettingsError(f"data.{stage} is not set: name the LLaVA JSON of this stage")
    samples = load_set(stage, uri)
    identity = cache_identity(settings, load_encoder(settings))
    parent = _parent(settings) if stage == "finetune" else None
    content = canonical(
        {
            "stage": stage,
            "samples": samples.digest,
            "cache": identity.key,
            "codec": settings.cache.codec,
            "data": mathematical_settings(settings.data),
            "projector": mathematical_settings(settings.projector),
            "llm": {**mathematical_settings(settings.llm), "fingerprint": llm_fingerprint(settings.llm.path)},
            "settings": mathematical_settings(stage_settings(settings, stage)),
            "parent": parent and parent["digest"],
        }
    )
    return _pinned(settings, stage, content, samples, identity, parent)


def _pinned(
    settings: RunSettings,
    stage: Stage,
    content: dict[str, Any],
    samples: SampleSet,
    identity: CacheIdentity,
    parent: dict[str, str] | None,
) -> Prepared:
    """An unfinished run keeps its pin; a finished one is taken up anew where the pictures have changed since."""
    pin_uri = storage.join(settings.output, "pins", f"{stage}-{settings_digest(content)[:16]}.json")
    current, index = _current_pin(settings, content, samples, identity)
    pin = _read_pin(pin_uri) or current
    if pin.run_digest != current.run_digest and StageRun(settings, stage, pin.run_digest).finished():
        pin = current
    if pin.index_version != index.version:
        index = DatasetIndex.open(index_uri(settings), pin.index_version)
    return Prepared(StageRun(settings, stage, pin.run_digest), pin, pin_uri, identity, samples, index, parent)


def hold_pin(settings: RunSettings, prepared: Prepared) -> FeatureCache:
    """Write the pin: for the next start of this run, and in the cache, so that nothing it reads is cleaned up.

    Returns:
        The pinned version.
    """
    storage.write_json(prepared.pin_uri, vars(prepared.pin))
    cache = FeatureCache.open(cache_uri(settings, prepared.identity), version=prepared.pin.cache_version)
    cache.pin(prepared.pin.run_digest, {"name": settings.name, "stage": prepared.run.stage, "output": settings.output})
    return cache


def _current_pin(
    settings: RunSettings, content: dict[str, Any], samples: SampleSet, identity: CacheIdentity
) -> tuple[Pin, DatasetIndex]:
    index, cache = DatasetIndex.latest(index_uri(settings)), cache_uri(settings, identity)
    if index is None:
        raise CacheError(f"there is no dataset index at {index_uri(settings)}: run cache_features first")
    version = latest_manifest(cache)
    if not version:
        raise CacheError(f"there is no feature cache at {cache}: run cache_features with these settings first")
    index_digest = index.digest(samples.image_names)
    return Pin(settings_digest({**content, "index": index_digest}), index.version, index_digest, version), index


def _read_pin(uri: str) -> Pin | None:
    try:
        return Pin(**storage.read_json(uri))
    except NotFoundError:
        return None


def _parent(settings: RunSettings) -> dict[str, str]:
    """URI and digest of stage 1: the one named, or this run's own."""
    named = settings.finetune.pretrained
    if named:
        data = storage.read_bytes(named)
        return {"uri": named, "digest": settings_digest({"projector": data.hex()})}
    if settings.data.pretrain is None:
        raise SettingsError("stage 2 needs a projector: set finetune.pretrained, or data.pretrain and run pretrain")
    own = prepare(settings, "pretrain")
    summary = own.run.finished()
    if summary is None:
        raise SettingsError(
            "stage 1 of this run has not finished: run pretrain with the same settings first, or set finetune.pretrained"
        )
    return {"uri": summary.results["projector"], "digest": own.run.digest}


def plan_samples(settings: RunSettings, stage: Stage, prepared: Prepared) -> TablePlan:
    """The sample table of the pinned index and cache."""
    options = stage_settings(settings, stage)
    tokenizer = load_tokenizer(settings.llm.path)
    cache = FeatureCache.open(cache_uri(settings, prepared.identity), version=prepared.pin.cache_version)
    images = indexed_images(prepared.index, prepared.samples.image_names)
    images = quarantine_into(images, cache.quarantined())
    samples = _fraction(prepared.samples.samples, options.fraction, options.seed)

    def tokens(sample: Sample) -> TokenisedSample:
        return tokenise(sample.conversation, tokenizer, options.template, sample_id=sample.id)

    table = plan_table(
        samples,
        prepared.samples.problems,
        images,
        tokenise=tokens,
        budget=visual_token_budget(settings.projector.name, settings.projector.settings),
        pixels=pixel_settings(settings),
        max_length=options.max_length,
        sub_images=options.sub_images,
    )
    _check(settings, table, len(samples), cache, options)
    return table


def _fraction(samples: list[Sample], fraction: float, seed: int) -> list[Sample]:
    """A seeded share of the samples, in their order."""
    if fraction == 1:
        return samples
    ranked = sorted(range(len(samples)), key=lambda i: settings_digest([seed, i]))
    return [samples[i] for i in sorted(ranked[: max(1, round(fraction * len(samples)))])]


def _check(
    settings: RunSettings, plan: TablePlan, num_samples: int, cache: FeatureCache, options: StageSettings
) -> None:
    limit = max(settings.data.min_bad_images - 1, settings.data.max_bad_share * num_samples)
    if len(plan.excluded) > limit:
        raise QuarantineLimitError(
            f"{len(plan.excluded)} of {num_samples} samples cannot be used ({plan.reasons()}), for example "
            f"{plan.excluded[0].sample_id}: {plan.excluded[0].message}. See `meteor data check`, or raise data.max_bad_share"
        )
    if not len(plan.table):
        raise SettingsError("no usable sample is left to train on")
    missing = set(plan.table.all_image_keys()) - set(cache.keys()) if options.features == "cache" else set()
    if missing:
        raise CacheError(
            f"{len(missing)} pictures are indexed and not in version {cache.version} of {cache.uri}: run cache_features again"
        )


def run_stage(settings: RunSettings, stage: Stage) -> Summary:
    """Train a stage, or resume it, or say that it is finished.

    Raises:
        TrainingError: the workers failed more often than ``runtime.max_failures``.
    """
    with timed() as seconds:
        prepared = prepare(settings, stage)
        finished = prepared.run.finished()
        if finished:
            return prepared.run.reuse(finished)
        cache = hold_pin(settings, prepared)
        plan = plan_samples(settings, stage, prepared)
        run = prepared.run
        plan.table.write(storage.join(run.uri, "samples.parquet"))
        storage.write_json(storage.join(run.uri, "excluded.json"), [vars(one) for one in plan.excluded])
        task = _task(settings, stage, prepared)
        run.start(pin=vars(prepared.pin), parent=prepared.parent, cache=task.cache_uri, cache_key=prepared.identity.key)
        params = {stage: mathematical_settings(stage_settings(settings, stage)), **_shared_params(settings)}
        with run.tracked(canonical(params)) as log:
            log.cache(cache, context="training")
            log.dataset(name=stage, digest=prepared.samples.digest, source=prepared.samples.uri, context="samples")
            num_steps = _num_steps(stage_settings(settings, stage), plan.table)
            _LOG.info("%s: %d samples, %d steps, run %s", stage, len(plan.table), num_steps, run.uri)
            _run_workers(settings, task, log, num_steps)
            summary = _summary(task, plan, num_steps, seconds())
            log.tag("meteor.result", task.result_uri)
        return run.finish(summary)


def plan_text(settings: RunSettings, stage: Stage) -> str:
    """The plan of a stage for ``--dry-run``."""
    prepared = prepare(settings, stage)
    plan, options = plan_samples(settings, stage, prepared), stage_settings(settings, stage)
    totals = plan.table.totals()
    num_steps = _num_steps(options, plan.table)
    state = "finished" if prepared.run.finished() else "to run or resume"
    lines = [
        f"{stage}: plan",
        f"  run                {prepared.run.uri} ({state})",
        f"  samples            {totals['samples']:,} used, {len(plan.excluded)} excluded {plan.reasons() or ''}",
        f"  cut to max_length  {plan.num_cut:,}",
        f"  sub-images         {totals['sub_images']:,} of {totals['distinct_images']:,} distinct pictures",
        f"  tokens             {totals['visual_tokens']:,} visual, {totals['text_tokens']:,} text",
        f"  steps              {num_steps:,} of {options.global_batch_size} samples, {options.epochs} epochs",
        f"  workers            {settings.runtime.num_workers}, ZeRO stage {options.zero_stage}, features: {options.features}",
        f"  pinned             index version {prepared.pin.index_version}, cache version {prepared.pin.cache_version}",
    ]
    return "\n".join(lines)


def _num_steps(options: StageSettings, table: SampleTable) -> int:
    return -(-len(table) // options.global_batch_size) * options.epochs


def _shared_params(settings: RunSettings) -> dict[str, Any]:
    names = ("slicing", "vision", "projector", "llm", "cache")
    return {name: mathematical_settings(getattr(settings, name)) for name in names}


def _task(settings: RunSettings, stage: Stage, prepared: Prepared) -> WorkerTask:
    tokenizer = load_tokenizer(settings.llm.path)
    live = stage_settings(settings, stage).features == "live"
    return WorkerTask(
        settings=settings,
        stage=stage,
        run_uri=prepared.run.uri,
        index_digest=prepared.pin.index_digest,
        cache_uri=cache_uri(settings, prepared.identity),
        cache_version=prepared.pin.cache_version,
        cache_identity=prepared.identity.to_dict(),
        separators=visual_separators(tokenizer),
        pad_id=tokenizer.pad_token_id,
        projector_uri=prepared.parent["uri"] if prepared.parent else None,
        image_uris=uris_by_key(prepared.index.rows()) if live else {},
    )


def _run_workers(settings: RunSettings, task: WorkerTask, log: StageLog, num_steps: int) -> None:
    runtime = settings.runtime
    attempts = storage.list_objects(storage.join(task.run_uri, "attempts"))
    # Ray Train returns at once for a name that it knows as finished or failed: every start gets a name of its own.
    name = f"{task.stage}-{task.run_uri[-12:]}-{len(attempts)}"
    storage.write_json(storage.join(task.run_uri, "attempts", f"{len(attempts):04d}.json"), {"name": name})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": task},
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
    last: dict[str, Any] = {}

    def steps_done() -> int:
        last.update(read_last(task.run_uri) or {})
        return int(last.get("step", 0))

    def detail() -> str:
        epochs = stage_settings(settings, task.stage).epochs
        return f"; epoch {last['epoch']:.2f} of {epochs}, loss {last['loss']:.4f}" if last else ""

    with progress(f"{task.stage}: step", num_steps, steps_done, detail=detail):
        try:
            trainer.fit()
        # The second where the controller itself has gone.
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            raise TrainingError(
                f"{task.stage} failed. Started again with the same command it goes on from its last checkpoint in "
                f"{task.run_uri}. Cause: {error}"
            ) from error


def _resources(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


class LogToMlflow(UserCallback):
    """Lives in Ray Train's controller, so that one MLflow run goes on through restarts of the workers.

    A thread sends: a server that does not answer holds nobody up. What it has not sent at the end, `StageLog.close` does.
    """

    def __init__(self, log: StageLog) -> None:
        self._log = log
        self._rows: queue.SimpleQueue[Mapping[str, Any]] | None = None

    def after_report(self, run_context: Any, metrics: list[Mapping[str, Any]], checkpoint: Any) -> None:
        if self._rows is None:
            self._rows = queue.SimpleQueue()
            threading.Thread(target=self._send, name="log to MLflow", daemon=True).start()
        for row in metrics[0]["rows"]:
            self._rows.put(row)

    def _send(self) -> None:
        assert self._rows is not None
        while True:
            rows = [self._rows.get()]
            while not self._rows.empty():
                rows.append(self._rows.get())
            self._log.live(rows)


def _summary(task: WorkerTask, plan: TablePlan, num_steps: int, seconds: float) -> Summary:
    rows = read_stage_run(task.run_uri).metrics
    busy_s = sum(row["seconds"] for row in rows)
    totals = plan.table.totals()
    counts = {
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
    kind = "projector" if task.stage == "pretrain" else "model"
    extra = {"training_seconds": busy_s, "excluded_reasons": plan.reasons(), "totals": totals}
    return Summary(task.stage, counts, seconds, {kind: task.result_uri, "run": task.run_uri}, extra=extra)
