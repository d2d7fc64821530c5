"""The whole pipeline in one Ray session: every stage of this run and of those it is compared with, then the report."""

import sys

from meteor.config import RunSettings, load_run, resolve_paths
from meteor.runs.mlflow_log import where_to_compare
from pipelines import cache_features, evaluate, finetune, pretrain, report
from pipelines.stage import Summary, stage_main, timed

_DESCRIPTION = """Run cache_features, pretrain, finetune and evaluate for this run and for those in report.compare, then report.
What has finished before is found and not done again."""
_STAGES = (cache_features, pretrain, finetune, evaluate)


def run(settings: RunSettings) -> Summary:
    with timed() as seconds:
        counts = {}
        for variant in variants(settings):
            for stage in _STAGES:
                summary = stage.run(variant)
                print(f"[{variant.name}] {summary.to_text()}", flush=True)
                counts[f"{variant.name} {summary.stage} seconds"] = round(summary.seconds, 1)
        summary = report.run(settings)
        return Summary("all", counts, seconds(), {**summary.results, "compare in MLflow": where_to_compare(settings)})


def variants(settings: RunSettings) -> list[RunSettings]:
    return [settings, *(resolve_paths(load_run(path)) for path in settings.report.compare)]


def plan(settings: RunSettings) -> str:
    """The cache's plan of every variant; later stages plan on what earlier ones publish."""
    return "\n".join(f"[{variant.name}] {cache_features.plan(variant)}" for variant in variants(settings))


if __name__ == "__main__":
    sys.exit(stage_main("all", _DESCRIPTION, run, plan))
