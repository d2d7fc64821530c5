"""MLflow runs of a study and its variants: all settings at the start, numbers at the end."""

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
from meteor.tracking import RunEnd, Tracker
from pipelines.studies.results import RunRecord, find_folder, find_folders, read_record, write_records

_LOG = logging.getLogger(__name__)


def announce(settings: RunSettings, variants: Sequence[Variant]) -> None:
    """Make the MLflow runs of the study and its variants, with all settings, so that MLflow can show the differences."""

    def send(tracker: Tracker, variant: Variant, run_id: str) -> None:
        tracker.log_params(run_id, mathematical_settings(variant.settings))
        tags = {"meteor.variant": variant.name, "meteor.study": settings.name}
        tags |= {"mlflow.source.git.commit": git_commit() or "unknown"}
        tags |= {"meteor.seed": str(variant.seed)} if variant.seed is not None else {}
        tracker.set_tags(run_id, {**tags, "mlflow.note.content": describe(variant.changes)})

    _send_each(variants, send)


def record(
    inputs: Inputs,
    variants: Sequence[Variant],
    measured: Mapping[str, Mapping[str, Any]],
    incomplete: Collection[str],
) -> None:
    """Write each variant's folders and numbers to the study's folder, and send them to MLflow.

    Args:
        inputs: settings of the study, and what they name.
        variants: variants that were run.
        measured: variant -> measurement of `pipelines.studies.efficiency`.
        incomplete: names of runs with a failed stage.
    """
    records = {
        variant.settings.name: _record(inputs.of(variant.settings), variant, measured.get(variant.name))
        for variant in variants
    }
    write_records(inputs.settings, list(records.values()))

    def send(tracker: Tracker, variant: Variant, run_id: str) -> None:
        run_record = records[variant.settings.name]
        tracker.set_tags(run_id, run_record.tags())
        tracker.log_metrics(run_id, [{"step": 0, **run_record.numbers}])
        tracker.finish(run_id, "FAILED" if variant.settings.name in incomplete else "FINISHED")

    _send_each(variants, send)


def _record(inputs: Inputs, variant: Variant, measured: Mapping[str, Any] | None) -> RunRecord:
    run = RunRecord(variant.settings.name, variant.name, variant.seed, find_folders(inputs))
    stages = estimate_cache(inputs).stages
    result = dataclasses.replace(
        read_record(run, measured),
        encoder_shares={stage.name: stage.encoder_share for stage in stages},
        encoder_flops={stage.name: stage.encoder_flops for stage in stages},
        encoding_s=_encoding_seconds(inputs),
    )
    return dataclasses.replace(run, numbers=numbers(result), hardware=measured["hardware"] if measured else "")


def _encoding_seconds(inputs: Inputs) -> float | None:
    """Return the seconds of all encoders together in the run that filled the cache; None if not recorded."""
    folder = find_folder(inputs, "cache_features")
    summary = folder.finished() if folder else None
    seconds = summary.counts.get("encoding_seconds") if summary else None
    return seconds * inputs.settings.runtime.num_encoders if seconds else None


def end_study(settings: RunSettings, end: RunEnd, incomplete: Sequence[RunSettings] = ()) -> None:
    """End the MLflow runs of the study and of its incomplete variants as failed or killed."""
    try:
        tracker = make_tracker(settings)
        for variant in incomplete:
            tracker.finish(parent_run(tracker, variant), end)
        tracker.finish(study_run(tracker, settings), end)
    except TrackingError as error:
        _LOG.warning("%s. The study's MLflow run is not marked as %s", error, end.lower())


def _send_each(variants: Sequence[Variant], send: Callable[[Tracker, Variant, str], None]) -> None:
    """Call ``send`` with the MLflow run of each variant; log a warning if the server cannot be reached."""
    try:
        tracker = make_tracker(variants[0].settings)
        for variant in variants:
            send(tracker, variant, parent_run(tracker, variant.settings))
    except TrackingError as error:
        _LOG.warning("%s. The study continues; run the same command again to send the rest to MLflow", error)


def describe(changes: Mapping[str, Any]) -> str:
    """Return a variant's changes on one line."""
    return ", ".join(f"{key}={value}" for key, value in changes.items()) or "no changes to the run file"
