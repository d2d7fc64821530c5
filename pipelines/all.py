"""Whole pipeline in one Ray session: every stage of this run and of the runs to compare with, then the report."""

import sys
from collections.abc import Callable

from meteor.assembly import Inputs
from meteor.config import RunSettings, load_run, resolve_paths
from meteor.planning.study import plan_study
from meteor.runs.folder import Summary
from meteor.runs.identity import describe_left_out, stages_of
from meteor.runs.mlflow_log import where_to_compare
from meteor.stages import Stage
from pipelines import cache_features, evaluate, finetune, pretrain, report
from pipelines.command import stage_main, timed

_DESCRIPTION = """Run cache_features, pretrain, finetune and evaluate for this run and for the runs in report.compare, then
report. Finished stages are skipped. The first lines name stages that do not run, for example evaluate if data.evaluate names
no question set."""
_RUN: dict[Stage, Callable[..., Summary]] = {
    "cache_features": cache_features.run,
    "pretrain": pretrain.run,
    "finetune": finetune.run,
    "evaluate": evaluate.run,
}


def run(inputs: Inputs) -> Summary:
    """Run all stages of this run and of the runs to compare with, then report."""
    with timed() as seconds:
        settings, counts = inputs.settings, {}
        runs = compared_runs(settings)
        for compared in runs:
            for line in describe_left_out(compared):
                print(f"[{compared.name}] {line}", flush=True)
        for compared in runs:
            for stage in stages_of(compared):
                summary = _RUN[stage](inputs.of(compared))
                print(f"[{compared.name}] {summary.to_text()}", flush=True)
                counts[f"{compared.name} {summary.stage} seconds"] = round(summary.seconds, 1)
        summary = report.run(inputs)
        return Summary("all", counts, seconds(), {**summary.results, "compare in MLflow": where_to_compare(settings)})


def compared_runs(settings: RunSettings) -> list[RunSettings]:
    """Return the run and the runs in ``report.compare``."""
    return [settings, *(resolve_paths(load_run(path)) for path in settings.report.compare)]


def plan(inputs: Inputs) -> str:
    """Return the plan of all stages of all runs as text."""
    return plan_study(inputs, compared_runs(inputs.settings)).to_text()


if __name__ == "__main__":
    sys.exit(stage_main("all", _DESCRIPTION, run, plan))
