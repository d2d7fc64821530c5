"""What MLflow is told of a study besides its stages: its variants with all their settings, and then their numbers."""

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from meteor.assembly import Inputs
from meteor.config import RunSettings, Variant, mathematical_settings
from meteor.errors import TrackingError
from meteor.planning.survey import estimate_cache
from meteor.report.study import numbers
from meteor.runs.folder import git_commit
from meteor.runs.mlflow_log import make_tracker, parent_run, study_run
from meteor.tracking import Tracker
from pipelines.studies.results import RunRecord, find_folders, read_record, write_records

_LOG = logging.getLogger(__name__)


def announce(settings: RunSettings, variants: Sequence[Variant]) -> None:
    """Make MLflow's runs of the study and its variants, with all their settings: comparing them shows what differs."""

    def tell(tracker: Tracker, variant: Variant, run_id: str) -> None:
        tracker.log_params(run_id, mathematical_settings(variant.settings))
        tags = {"meteor.variant": variant.name, "meteor.study": settings.name}
        tags |= {"mlflow.source.git.commit": git_commit() or "unknown"}
        tags |= {"meteor.seed": str(variant.seed)} if variant.seed is not None else {}
        tracker.set_tags(run_id, {**tags, "mlflow.note.content": describe(variant.changes)})

    _tell_mlflow(variants, tell)


def record(
    settings: RunSettings,
    variants: Sequence[Variant],
    measured: Mapping[str, Mapping[str, Any]],
    incomplete: Collection[str],
    inputs: Inputs,
) -> None:
    """Put each variant's folders and numbers side by side: in the study's folder, and in MLflow.

    Args:
        settings: of the study.
        variants: those that were run.
        measured: variant -> what answering costs.
        incomplete: names of runs of which a stage failed.
        inputs: the command's inputs.
    """
    records = {variant.settings.name: _record(variant, measured.get(variant.name), inputs) for variant in variants}
    write_records(settings, list(records.values()))

    def tell(tracker: Tracker, variant: Variant, run_id: str) -> None:
        one = records[variant.settings.name]
        tracker.set_tags(run_id, one.tags())
        tracker.log_metrics(run_id, [{"step": 0, **one.numbers}])
        tracker.finish(run_id, failed=variant.settings.name in incomplete)

    _tell_mlflow(variants, tell)


def _record(variant: Variant, measured: Mapping[str, Any] | None, inputs: Inputs) -> RunRecord:
    run = RunRecord(variant.settings.name, variant.name, variant.seed, find_folders(variant.settings, inputs))
    result = dataclasses.replace(
        read_record(run, measured),
        encoder_shares={stage.name: stage.encoder_share for stage in estimate_cache(variant.settings, inputs).stages},
    )
    return dataclasses.replace(run, numbers=numbers(result), hardware=measured["hardware"] if measured else "")


def mark_failed(settings: RunSettings) -> None:
    """End the study's run in MLflow as failed."""
    try:
        tracker = make_tracker(settings)
        tracker.finish(study_run(tracker, settings), failed=True)
    except TrackingError as error:
        _LOG.warning("%s. There the study's run stays as it was", error)


def _tell_mlflow(variants: Sequence[Variant], tell: Callable[[Tracker, Variant, str], None]) -> None:
    """Do something for each variant's run; a warning where the server is away."""
    try:
        tracker = make_tracker(variants[0].settings)
        for variant in variants:
            tell(tracker, variant, parent_run(tracker, variant.settings))
    except TrackingError as error:
        _LOG.warning("%s. The study goes on; run the same command again to complete what MLflow knows", error)


def describe(changes: Mapping[str, Any]) -> str:
    """A variant's changes on one line."""
    return ", ".join(f"{key}={value}" for key, value in changes.items()) or "as the run file has it"
