"""A study: variants of one run trained over one cache, what they share once, what there is room for at the same time."""

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence

import ray

from meteor import storage
from meteor.cache.upkeep.transcode import transcode
from meteor.config import RunSettings, Variant, expand_study, load_run, resolve_paths
from meteor.errors import TrainingError
from meteor.runs.mlflow_log import where_to_compare
from pipelines import cache_features, report
from pipelines.ray_parts.runtime import ray_session
from pipelines.stage import Summary, git_commit, guarded, stage_parser, timed
from pipelines.studies.efficiency import measure_variants
from pipelines.studies.log import announce, mark_failed, record
from pipelines.studies.results import choose_variants
from pipelines.studies.schedule import Outcome, run_tasks
from pipelines.studies.tasks import (
    STAGES,
    Task,
    distinct_caches,
    hold_pins,
    other_codec,
    plan_tasks,
    read_pins,
    study_uri,
)
from pipelines.study_plan import plan_study

_LOG = logging.getLogger(__name__)
_DESCRIPTION = """Train and score every variant of a run's `study:` over one cache. Images are encoded once, stages that
variants agree on are trained once, and all of them see the same batches. One that fails stops no other; started again, what
has finished is found and not done again."""


def run(settings: RunSettings, variants: Sequence[Variant]) -> Summary:
    """Encode, train, score, measure, report.

    Raises:
        TrainingError: a variant failed, after all others are done and the report is written.
    """
    with timed() as seconds:
        fill_caches(variants)
        pins = hold_pins(settings, variants)
        variants = [dataclasses.replace(one, settings=pins.of(one.settings)) for one in variants]
        tasks = plan_tasks(variants)
        print(plan_study(settings, variants, tasks), flush=True)
        write_study(settings, variants)
        announce(settings, variants)
        outcomes = run_tasks(
            {key: task.needs for key, task in tasks.items()},
            lambda key: _run_task(tasks[key]),
            parallel=settings.study.parallel or room(variants) if settings.study else 1,
        )
        failed = {tasks[key].label: one for key, one in outcomes.items() if one.error}
        measured = measure_variants(settings, variants)
        incomplete = {name for key, one in outcomes.items() if one.error for name in tasks[key].used_by}
        record(settings, variants, measured, incomplete)
        written = report.run(settings)
        if failed:
            mark_failed(settings)
    counts = {
        "variants": len(variants),
        "stages": len(tasks),
        "stages finished before": sum(one.result.reused for one in outcomes.values() if not one.error),
        "stages failed": len(failed),
        "variants measured": len(measured),
    }
    summary = Summary("ablate", counts, seconds(), {**written.results, "compare in MLflow": where_to_compare(settings)})
    if failed:
        print(summary.to_text())
        raise TrainingError(_failures(failed))
    return summary


def fill_caches(variants: Sequence[Variant]) -> None:
    """Encode what no cache holds yet; features that another codec holds are converted."""
    for settings, users in distinct_caches(variants).values():
        source = other_codec(settings)
        if source is not None:
            _convert(source, settings.cache.codec)
        shared = settings.tracking.model_copy(update={"used_by": users if len(users) > 1 else ()})
        summary = cache_features.run(settings.model_copy(update={"tracking": shared}))
        _LOG.info(
            "cache for %d runs: %s of %s images encoded now, %s",
            len(users),
            summary.counts["images_encoded"] if not summary.reused else 0,
            summary.counts["distinct_images"],
            summary.results["cache"],
        )


def _convert(source: str, codec: str) -> None:
    """Make what a cache in one codec holds in another."""
    told = False

    def tell(num_done: int, num_images: int) -> None:
        nonlocal told
        if not told:
            _LOG.info("cache in %s: made from %s, without the encoder", codec, source)
            told = True

    transcode(source, codec, on_progress=tell)


def room(variants: Sequence[Variant]) -> int:
    """How many variants the cluster's CPUs and GPUs have room for at the same time, at least 1."""
    have = ray.cluster_resources()

    def fits(settings: RunSettings) -> int:
        runtime = settings.runtime
        workers = max(runtime.num_workers, runtime.num_evaluators)
        wanted = {"CPU": workers * runtime.cpus_per_worker, "GPU": workers * runtime.gpus_per_worker}
        return min(int(have.get(kind, 0) / amount + 1e-9) for kind, amount in wanted.items() if amount)

    return max(1, min(fits(variant.settings) for variant in variants))


def _run_task(task: Task) -> Summary:
    try:
        summary = STAGES[task.stage].run(task.settings)
    except Exception as error:
        # It stops what needs it alone; the others go on for hours, and whoever watches wants to know now.
        _LOG.error("[%s] failed: %s: %s", task.label, type(error).__name__, error)
        raise
    print(f"[{task.label}] {summary.to_text()}", flush=True)
    return summary


def write_study(settings: RunSettings, variants: Sequence[Variant]) -> None:
    """Write ``study.json``: everything needed to repeat the study."""
    content = {
        "name": settings.name,
        "settings": settings.model_dump(mode="json"),
        "git_commit": git_commit(),
        "variants": [
            {"name": one.name, "seed": one.seed, "changes": dict(one.changes), "run": one.settings.name}
            for one in variants
        ],
    }
    storage.write_json(study_uri(settings, "study.json"), content)


def _failures(failed: Mapping[str, Outcome]) -> str:
    lines = [
        f"  {label}: {type(one.error).__name__}: {str(one.error).partition(chr(10))[0]}"
        for label, one in failed.items()
        if one.tried
    ]
    skipped = [label for label, one in failed.items() if not one.tried]
    lines += [f"  not tried, as they need these: {'; '.join(skipped)}"] if skipped else []
    return "\n".join(["these stages failed; the same command tries them again, and nothing else", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = stage_parser("ablate", _DESCRIPTION)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="a variant (`*` stands for any letters) or the title of a table, whose variants alone are run; may be repeated",
    )
    arguments = parser.parse_args(argv)

    def act() -> int:
        settings = resolve_paths(load_run(arguments.run, arguments.overrides))
        names = choose_variants(settings, arguments.only)
        variants = [
            dataclasses.replace(one, settings=resolve_paths(one.settings))
            for one in expand_study(settings)
            if one.name in names
        ]
        if arguments.dry_run:
            pins = read_pins(settings)
            if pins is not None:
                variants = [dataclasses.replace(one, settings=pins.of(one.settings)) for one in variants]
            print(plan_study(settings, variants, plan_tasks(variants)))
            return 0
        with ray_session(settings.runtime):
            print(run(settings, variants).to_text())
        return 0

    return guarded(act)


if __name__ == "__main__":
    sys.exit(main())
