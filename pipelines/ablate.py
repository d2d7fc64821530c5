"""Study: variants of a run are trained over one cache; shared stages run once, and as many at the same time as fit."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import ray

from meteor.assembly import Inputs
from meteor.assembly.study import hold_pins, pinned_variants, study_uri, study_variants
from meteor.checksums import write_checked_json
from meteor.command_line import OK, parse, read_run
from meteor.config import RunSettings, Variant
from meteor.errors import TrainingError
from meteor.formatting import shorten
from meteor.planning.study import plan_study
from meteor.runs.claim import Claim
from meteor.runs.folder import Summary, git_commit
from meteor.runs.mlflow_log import where_to_compare
from meteor.runs.tasks import Task, make_tasks
from meteor.stopping import Stopped, stop_signal
from pipelines import evaluate, finetune, pretrain, report
from pipelines.command import guarded, stage_parser, timed
from pipelines.ray_parts.runtime import job_id, ray_session, stop_ray
from pipelines.studies.caches import fill_caches
from pipelines.studies.efficiency import measure_variants
from pipelines.studies.log import announce, end_study, record
from pipelines.studies.results import choose_variants
from pipelines.studies.schedule import Outcome, run_tasks

_LOG = logging.getLogger(__name__)
_DESCRIPTION = """Train and score every variant of a run's `study:` over one cache. Images are encoded once, stages that
variants share are trained once, and all variants see the same batches. A failed variant stops no other. A second start
skips finished stages."""
# Letters of the list of stages that are left after a stop.
_MAX_LEFT = 500
_RUN: dict[str, Callable[..., Summary]] = {"pretrain": pretrain.run, "finetune": finetune.run, "evaluate": evaluate.run}


def run(inputs: Inputs, variants: Sequence[Variant]) -> Summary:
    """Encode, train, score, measure, report.

    Raises:
        SupersededError: a newer start of the study has taken over.
        TrainingError: a variant failed; it is raised after all others are done and the report is written.
    """
    with timed() as seconds:
        settings = inputs.settings
        claim = Claim.take(study_uri(settings), stage="ablate", job=job_id())
        fill_caches(inputs, make_tasks([inputs.of(variant.settings) for variant in variants]).values())
        pins = hold_pins(inputs, variants)
        variants = [pins.apply(variant, inputs) for variant in variants]
        runs = [variant.settings for variant in variants]
        print(plan_study(inputs, runs).to_text(), flush=True)
        write_study(settings, variants)
        announce(settings, variants)
        # The caches are filled; every other task waits for the tasks before it.
        tasks = {key: task for key, task in make_tasks([inputs.of(run) for run in runs]).items() if task.stage in _RUN}
        with _ends_when_stopped(settings, runs, tasks):
            outcomes = run_tasks(
                {key: [need for need in task.needs if need in tasks] for key, task in tasks.items()},
                lambda key: _run_task(inputs, tasks[key], claim),
                parallel=settings.study.parallel or num_fitting_runs(runs) if settings.study else 1,
                interrupt=stop_ray,
            )
        claim.check()
        failed = {tasks[key].label: outcome for key, outcome in outcomes.items() if outcome.error}
        measured = measure_variants(inputs, variants)
        incomplete = {name for key, outcome in outcomes.items() if outcome.error for name in tasks[key].used_by}
        record(inputs, variants, measured, incomplete)
        written = report.run(inputs)
        if failed:
            end_study(settings, "FAILED")
    counts = {
        "variants": len(variants),
        "stages": len(tasks),
        "stages finished before": sum(outcome.result.reused for outcome in outcomes.values() if not outcome.error),
        "stages failed": len(failed),
        "variants measured": len(measured),
    }
    summary = Summary("ablate", counts, seconds(), {**written.results, "compare in MLflow": where_to_compare(settings)})
    if failed:
        print(summary.to_text())
        raise TrainingError(_failures(failed))
    return summary


def num_fitting_runs(runs: Sequence[RunSettings]) -> int:
    """Return how many runs fit the cluster's CPUs and GPUs at the same time, at least 1."""
    have = ray.cluster_resources()

    def fits(settings: RunSettings) -> int:
        runtime = settings.runtime
        workers = max(runtime.num_workers, runtime.num_evaluators)
        wanted = {"CPU": workers * runtime.cpus_per_worker, "GPU": workers * runtime.gpus_per_worker}
        return min(int(have.get(kind, 0) / amount + 1e-9) for kind, amount in wanted.items() if amount)

    return max(1, min(map(fits, runs)))


def _run_task(inputs: Inputs, task: Task, claim: Claim) -> Summary:
    # Two starts of a study would take its stages from each other in turns.
    claim.check()
    try:
        summary = _RUN[task.stage](inputs.of(task.settings))
    except Exception as error:
        # Other stages may run for hours before the summary names this error. A stop ends all tasks, with errors of any kind.
        if stop_signal() is None:
            _LOG.error("[%s] failed: %s: %s", task.label, type(error).__name__, error)
        raise
    print(f"[{task.label}] {summary.to_text()}", flush=True)
    return summary


@contextmanager
def _ends_when_stopped(settings: RunSettings, runs: Sequence[RunSettings], tasks: Mapping[str, Task]) -> Iterator[None]:
    """After a stop, end the study's MLflow runs and name the stages that are left."""
    try:
        yield
    except KeyboardInterrupt as error:
        left = [task for task in tasks.values() if not task.folder.finished()]
        names = {name for task in left for name in task.used_by}
        end_study(settings, "KILLED", [run for run in runs if run.name in names])
        labels = shorten("; ".join(task.label for task in left), _MAX_LEFT)
        raise Stopped(
            f"[{settings.name}] stopped; the same command goes on with {len(left)} of {len(tasks)} stages: {labels}"
        ) from error


def write_study(settings: RunSettings, variants: Sequence[Variant]) -> None:
    """Write ``study.json``: everything that is needed to repeat the study."""
    content = {
        "name": settings.name,
        "settings": settings.model_dump(mode="json"),
        "git_commit": git_commit(),
        "variants": [
            {
                "name": variant.name,
                "seed": variant.seed,
                "changes": dict(variant.changes),
                "run": variant.settings.name,
            }
            for variant in variants
        ],
    }
    write_checked_json(study_uri(settings, "study.json"), content)


def _failures(failed: Mapping[str, Outcome]) -> str:
    lines = [
        f"  {label}: {type(outcome.error).__name__}: {str(outcome.error).partition(chr(10))[0]}"
        for label, outcome in failed.items()
        if outcome.tried
    ]
    skipped = [label for label, outcome in failed.items() if not outcome.tried]
    lines += [f"  not tried, as they need failed stages: {'; '.join(skipped)}"] if skipped else []
    return "\n".join(["these stages failed; the same command tries them again, and no finished stage", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see `meteor.command_line` for the exit status."""
    parser = stage_parser("ablate", _DESCRIPTION)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="run only this variant (`*` matches any letters), or the variants of the table with this title; repeatable",
    )
    arguments = parse(parser, argv)

    def act() -> int:
        settings = read_run(arguments)
        inputs = Inputs(settings)
        names = choose_variants(settings, arguments.only)
        variants = [variant for variant in study_variants(settings) if variant.name in names]
        if arguments.dry_run:
            pinned = pinned_variants(inputs, variants)
            print(plan_study(inputs, [variant.settings for variant in pinned]).to_text())
            return OK
        with ray_session(settings.runtime):
            print(run(inputs, variants).to_text())
        return OK

    return guarded(act)


if __name__ == "__main__":
    sys.exit(main())
