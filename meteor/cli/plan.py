"""`meteor plan`: what a whole study takes before it is started: GPU hours by stage, storage, what the cache avoids."""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

from meteor import storage
from meteor.assembly import question_sets
from meteor.cli.cache_plan import PlanInputs, count_llm_parameters, plan_cache
from meteor.cli.options import add_json, add_run, read_run
from meteor.config import RunSettings, Variant, expand_study, mathematical_settings, resolve_paths, settings_digest
from meteor.errors import MeteorError, SettingsError
from meteor.planning.cache_cost import FLOPS_PER_PARAMETER, USD_PER_GB, CachePlan
from meteor.planning.sizes import find_model_sizes
from meteor.planning.study_cost import Rate, StudyCost, Work, weighted_rate
from meteor.stages import TrainingStage
from meteor.train.build import DTYPES, read_llm_config
from meteor.train.flops import PEAK_TFLOPS
from meteor.train.lora import Lora, add_lora
from meteor.vision.checkpoint import read_vision_config

_STAGES: tuple[TrainingStage, ...] = ("pretrain", "finetune")
# Master, two moments, in float32.
_CHECKPOINT_BYTES = 12


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="GPU hours, storage and money of a run or a whole study, and what the cache avoids",
        description="Cost of a run, or of all variants of its `study:`, stages that variants share counted once. Rates are "
        "the ones given, else those measured by finished runs below --measured, else what --gpu does at --mfu.",
    )
    add_run(parser)
    parser.add_argument("--measured", metavar="URI", help="root of finished runs; the run's own output if not given")
    parser.add_argument(
        "--gpu",
        default="H100",
        choices=PEAK_TFLOPS,
        metavar="NAME",
        help=f"one of {', '.join(PEAK_TFLOPS)} (default: H100)",
    )
    parser.add_argument(
        "--mfu", type=_share, default=0.4, help="share of the GPU's peak that training reaches (default: %(default)s)"
    )
    parser.add_argument("--sub-images-per-s", type=float, metavar="N", help="that one GPU encodes")
    parser.add_argument("--questions-per-s", type=float, metavar="N", help="that one GPU answers")
    parser.add_argument("--usd-per-gpu-hour", type=float, metavar="USD", help="price of a GPU")
    parser.add_argument(
        "--usd-per-gb", type=float, default=USD_PER_GB, metavar="USD", help="of storage, a month (default: %(default)s)"
    )
    add_json(parser)
    parser.set_defaults(command=_plan)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1")
    return value


def _plan(arguments: argparse.Namespace) -> int:
    settings = read_run(arguments)
    cost = plan_cost(settings, arguments)
    prices = {"usd_per_gb": arguments.usd_per_gb, "usd_per_gpu_hour": arguments.usd_per_gpu_hour}
    print(json.dumps(cost.to_dict(**prices), indent=2) if arguments.json else cost.to_text(**prices))
    return 0


def plan_cost(settings: RunSettings, arguments: argparse.Namespace) -> StudyCost:
    """The cost of a run's study, or of the run where it has none; rates as the command line says."""
    variants = [resolve_paths(one.settings) for one in _variants(settings)]
    inputs = PlanInputs()
    plans = {_cache_key(one): plan_cache(one, inputs) for one in variants}
    stages = {stage: _distinct(variants, stage) for stage in _STAGES}
    on_gpus = settings.runtime.gpus_per_worker > 0
    runs = [
        one
        for one in _finished_runs(arguments.measured or settings.output)
        if (one[0].runtime.gpus_per_worker > 0) == on_gpus  # a CPU's rate says nothing of a GPU
    ]
    encoder = _encoder_rate(runs, arguments, list(plans.values()))
    work = [
        Work(
            "cache_features",
            len({plan.cache_uri for plan in plans.values()}),
            sum(plan.num_sub_images * _missing_share(plan) for plan in _distinct_caches(plans)),
            "sub-images",
            encoder,
        )
    ]
    training = {stage: [plan_cache(one, inputs) for one in stages[stage]] for stage in _STAGES}
    for stage in _STAGES:
        flops = sum(part.llm_flops for plan in training[stage] for part in plan.stages if _is_of(part.name, stage))
        if stages[stage]:
            work.append(Work(stage, len(stages[stage]), flops, "FLOP", _training_rate(stage, runs, arguments)))
    shown = sum(
        part.num_sub_images * part.epochs
        for stage in _STAGES
        for plan in training[stage]
        for part in plan.stages
        if _is_of(part.name, stage)
    )
    asked = _distinct(variants, "evaluate")
    if asked:
        num_questions = sum(len(questions.questions) for one in asked for questions in question_sets(one))
        work.append(Work("evaluate", len(asked), num_questions, "questions", _answer_rate(runs, arguments)))
    return StudyCost(
        name=settings.name,
        num_variants=len(variants),
        work=tuple(work),
        cache_bytes={plan.codec: plan.size_bytes[plan.codec] for plan in plans.values()},
        checkpoint_bytes=sum(_stage_bytes(one, stage) for stage in _STAGES for one in stages[stage]),
        avoided_sub_images=shown - sum(plan.num_sub_images for plan in _distinct_caches(plans)),
        encoder_rate=encoder,
        num_gpus=settings.runtime.num_workers,
        notes=tuple(dict.fromkeys(plan.note for plan in plans.values() if plan.note)),
    )


def _variants(settings: RunSettings) -> Sequence[Variant]:
    if settings.study is None:
        return [Variant(settings.name, None, {}, settings)]
    return expand_study(settings)


def _cache_key(settings: RunSettings) -> str:
    names = ("data", "slicing", "vision", "cache")
    paths = {"vision": settings.vision.path, "data": settings.data.model_dump(mode="json")}
    return settings_digest([{name: mathematical_settings(getattr(settings, name)) for name in names}, paths])


def _distinct_caches(plans: dict[str, CachePlan]) -> list[CachePlan]:
    """One of all codecs that share an encoder and images: the others are converted."""
    return list({plan.cache_uri.rpartition("/")[0]: plan for plan in plans.values()}.values())


def _missing_share(plan: CachePlan) -> float:
    return 1 - plan.num_cached / plan.num_distinct if plan.num_distinct else 0.0


def _distinct(variants: Sequence[RunSettings], stage: str) -> list[RunSettings]:
    """The first of all variants that agree on a stage, where they ask for it."""
    found: dict[str, RunSettings] = {}
    for one in variants:
        if (key := _stage_key(one, stage)) is not None:
            found.setdefault(key, one)
    return list(found.values())


def _stage_key(settings: RunSettings, stage: str) -> str | None:
    """Of what decides about a stage's numbers, as far as settings say; None where the run has no such stage."""
    shared = {name: mathematical_settings(getattr(settings, name)) for name in ("projector", "llm")}
    shared |= {"cache": {"key": _cache_key(settings)}, "paths": {"llm": settings.llm.path}}
    before: str | None
    if stage == "evaluate":
        before = settings.evaluate.model or _stage_key(settings, "finetune")
        if not settings.data.evaluate or before is None:
            return None
        return settings_digest([before, mathematical_settings(settings.evaluate)])
    if not settings.data.sources(stage):  # type: ignore[arg-type]
        return None
    own = mathematical_settings(settings.training(stage))
    if stage == "pretrain":
        return None if settings.finetune.pretrained else settings_digest([shared, own])
    return settings_digest([shared, own, settings.finetune.pretrained or _stage_key(settings, "pretrain")])


def _is_of(name: str, stage: str) -> bool:
    """Whether a part of a plan, a stage or one of its files, belongs to a stage."""
    return name == stage or name.startswith(f"{stage}, ")


def _stage_bytes(settings: RunSettings, stage: TrainingStage) -> int:
    """Kept checkpoints, and what the stage leaves."""
    options = settings.training(stage)
    lora = settings.finetune.lora if stage == "finetune" else None

    def adapt(language_model: Any) -> None:
        if lora is not None:
            add_lora(language_model, Lora(lora.rank, lora.alpha, lora.dropout, options.seed))

    sizes = find_model_sizes(
        read_llm_config(settings.llm.path),
        read_vision_config(settings.vision.path),
        {"name": settings.projector.name, **settings.projector.settings},
        stage,
        dtype=DTYPES[settings.llm.dtype],
        live=False,
        adapt=adapt,
    )
    kept = options.keep_checkpoints + bool(settings.data.held_out.get(stage))
    result = 4 * sizes.trained
    if stage == "finetune":
        result = DTYPES[settings.llm.dtype].itemsize * (sizes.trained + sizes.frozen)
    return kept * _CHECKPOINT_BYTES * sizes.trained + result


def _finished_runs(root: str) -> Iterator[tuple[RunSettings, dict[str, Any]]]:
    """Settings and summary of the stages that have finished below an output folder."""
    for info in storage.list_objects(storage.join(root, "runs")):
        folder, _, name = info.uri.rpartition("/")
        if name == "summary.json":
            try:
                stored = storage.read_json(storage.join(folder, "run.json"))["settings"]
                yield RunSettings.model_validate(stored), storage.read_json(info.uri)
            except (MeteorError, ValueError, KeyError):
                continue  # of another release


def _of_stage(
    runs: Sequence[tuple[RunSettings, dict[str, Any]]], stage: str
) -> list[tuple[RunSettings, dict[str, Any], dict[str, Any]]]:
    return [(run, summary["counts"], summary["extra"]) for run, summary in runs if summary["stage"] == stage]


def _encoder_rate(
    runs: Sequence[tuple[RunSettings, dict[str, Any]]], arguments: argparse.Namespace, plans: Sequence[CachePlan]
) -> Rate | None:
    if arguments.sub_images_per_s:
        return Rate(arguments.sub_images_per_s, "given")
    done = [
        (counts["sub_images_encoded"], counts["encoding_seconds"] * run.runtime.num_encoders)
        for run, counts, _ in _of_stage(runs, "cache_features")
        if counts.get("sub_images_encoded")
    ]
    measured = weighted_rate(done, f"measured by {len(done)} runs")
    num_sub_images = sum(plan.num_sub_images for plan in plans)
    if measured or not num_sub_images:
        return measured
    flops = sum(plan.encoder_flops for plan in plans) / num_sub_images
    return Rate(_flops_per_s(arguments) / flops, _assumption(arguments))


def _training_rate(
    stage: TrainingStage, runs: Sequence[tuple[RunSettings, dict[str, Any]]], arguments: argparse.Namespace
) -> Rate:
    done = []
    for run, _, extra in _of_stage(runs, stage):
        options = run.training(stage)
        tokens = (extra["totals"]["visual_tokens"] + extra["totals"]["text_tokens"]) * options.epochs
        try:
            flops = FLOPS_PER_PARAMETER[stage] * count_llm_parameters(run.llm.path) * tokens
        except SettingsError:
            continue  # its language model is not to be had any more
        done.append((flops, extra["training_seconds"] * run.runtime.num_workers))
    return weighted_rate(done, f"measured by {len(done)} runs") or Rate(_flops_per_s(arguments), _assumption(arguments))


def _answer_rate(runs: Sequence[tuple[RunSettings, dict[str, Any]]], arguments: argparse.Namespace) -> Rate | None:
    if arguments.questions_per_s:
        return Rate(arguments.questions_per_s, "given")
    done = [
        (counts["answered_now"], counts["answered_now"] / counts["questions_per_s"] * run.runtime.num_evaluators)
        for run, counts, _ in _of_stage(runs, "evaluate")
        if counts.get("answered_now")
    ]
    return weighted_rate(done, f"measured by {len(done)} runs, their start included")


def _flops_per_s(arguments: argparse.Namespace) -> float:
    return arguments.mfu * PEAK_TFLOPS[arguments.gpu] * 1e12


def _assumption(arguments: argparse.Namespace) -> str:
    return f"assumed: {arguments.mfu:.0%} of {arguments.gpu}'s peak"
