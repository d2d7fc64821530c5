"""Stage 4, report: results of runs as Markdown and as a self-contained HTML page."""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from meteor import storage
from meteor.assembly import Inputs, index_uri, pixel_settings
from meteor.cache import DatasetIndex, FeatureCache
from meteor.config import RunSettings, load_run, resolve_paths
from meteor.errors import SettingsError, TrackingError
from meteor.evaluation.selection import SelectedPatches, select_patches
from meteor.image.decode import decode_image
from meteor.image.files import read_image_file
from meteor.model.trained_projector import load_trained_projector
from meteor.report import (
    RunResult,
    SelectionPanel,
    SubImageScores,
    choose_predictions,
    write_report,
)
from meteor.report.seeds import merge_seeds
from meteor.runs.folder import Summary
from meteor.runs.mlflow_log import make_tracker, parent_run, study_run
from pipelines.command import stage_main, timed
from pipelines.studies.results import (
    collect,
    find_folder,
    find_records,
    read_record,
    study_tables,
    unequal_samples,
    unequal_workers,
)

_LOG = logging.getLogger(__name__)
_DESCRIPTION = """Write report.md and report.html, with settings, loss curves, scores, throughput and figures of this run and
of the runs in report.compare, side by side. The report names stages that have not run."""


def run(inputs: Inputs) -> Summary:
    """Collect results, draw figures, write the pages; the variants of a study are found in MLflow."""
    with timed() as seconds:
        settings, variants = inputs.settings, _collect_all(inputs)
        if not any(variant.stages for variant in variants):
            raise SettingsError("no stage of this run has started: there is nothing to report")
        shown = merge_seeds(variants)
        panels = [panel for variant in shown for panel in draw_panels(settings, variant)]
        uri = storage.join(settings.output, "report", settings.name)
        paths = write_report(
            uri,
            title=settings.name,
            variants=variants,
            panels=panels,
            cache=cache_facts(inputs),
            notes=[*unequal_samples(variants), *unequal_workers(variants)],
            thumbnails=_thumbnails(settings, shown),
            tables=study_tables(settings),
        )
        try:
            _log(settings, uri, failed=any(not stage.finished for run in variants for stage in run.stages.values()))
        except TrackingError as error:
            _LOG.warning("%s. The report is written; run this stage again to send it to MLflow", error)
        counts = {"variants": len(shown), "runs": len(variants), "figures_of_images": len(panels)}
        return Summary("report", counts, seconds(), {"markdown": paths.markdown, "html": paths.html})


def _collect_all(inputs: Inputs) -> list[RunResult]:
    settings = inputs.settings
    if settings.study is not None:
        return [read_record(record) for record in find_records(settings)]
    compared = [resolve_paths(load_run(path)) for path in settings.report.compare]
    return [collect(inputs.of(run)) for run in [settings, *compared]]


def _log(settings: RunSettings, uri: str, *, failed: bool) -> None:
    """Attach all files of the report to the MLflow run of the pipeline or study."""
    tracker = make_tracker(settings)
    find = parent_run if settings.study is None else study_run
    run_id = find(tracker, settings)
    for info in storage.list_objects(uri):
        tracker.log_file(run_id, f"report/{info.uri.removeprefix(uri).lstrip('/')}", storage.read_bytes(info.uri))
    tracker.finish(run_id, "FAILED" if failed else "FINISHED")


def plan(inputs: Inputs) -> str:
    """List the finished stages that the report would show."""
    variants = _collect_all(inputs)
    lines = ["report: plan"]
    for variant in variants:
        done = [stage for stage, record in variant.stages.items() if record.finished]
        lines.append(f"  {variant.name}: finished {', '.join(done) or 'nothing'}")
    return "\n".join(lines)


def cache_facts(inputs: Inputs) -> dict[str, Any] | None:
    """Return facts about the cache for the report; None if cache_features has not finished."""
    folder = find_folder(inputs, "cache_features")
    summary = folder.finished() if folder else None
    if summary is None:
        return None
    counts, extra = summary.counts, summary.extra
    return {
        "num_images_named_by_the_samples": counts["images"],
        "num_distinct_images": counts["distinct_images"],
        "num_sub_images_in_cache": counts["sub_images_cached"],
        "payload_bytes": counts["payload_bytes"],
        "codec": extra["codec"],
        "cache_key": extra["cache_key"],
        "encoder": inputs.settings.vision.path.rpartition("/")[2],
        "encoder_digest": extra["identity"]["encoder_digest"],
        "num_quarantined": counts["quarantined"],
        "quarantine_reasons": extra["reasons"],
    }


def draw_panels(settings: RunSettings, variant: RunResult) -> list[SelectionPanel]:
    """Find the kept patches of some evaluated images; empty if the projector selects none.

    Only the weights of the projector are loaded.
    """
    if not variant.predictions or settings.report.num_figures == 0:
        return []
    evaluated = variant.stages["evaluate"].recorded
    projector = load_trained_projector(evaluated["parent"]["uri"], device="cpu", dtype=torch.float32)
    cache = FeatureCache.open(evaluated["cache"])
    panels = []
    for row in _pick(settings, variant.predictions, cache):
        image = cache.get(row["image_key"])
        patches = select_patches(
            projector.module, image, select_layer=projector.select_layer, k=variant.answered_k(row["set"])
        )
        if patches[0].combined is None:
            return []
        panels.append(
            SelectionPanel(
                title=row["image"],
                question=row["question"],
                answer=row["answer"],
                prediction=row["prediction"],
                image=_open(row["uri"], settings),
                plan=pixel_settings(settings).plan(image.width, image.height),
                sub_images=tuple(_scores(sub_image) for sub_image in patches),
                variant=variant.name,
            )
        )
    return panels


def _scores(patches: SelectedPatches) -> SubImageScores:
    assert patches.combined is not None
    return SubImageScores(patches.combined, patches.kept, patches.visual, patches.native)


def _pick(settings: RunSettings, predictions: Sequence[dict[str, Any]], cache: FeatureCache) -> list[dict[str, Any]]:
    """Choose questions whose image is cached, each image once, half of them sliced; the choice is the same every time."""
    index = DatasetIndex.latest(index_uri(settings))
    rows = {row.name: row for row in index.rows()} if index else {}
    pixels, seen = pixel_settings(settings), set()
    sliced: list[dict[str, Any]] = []
    whole: list[dict[str, Any]] = []
    for prediction in predictions:
        row = rows.get(prediction["image"])
        if row is None or row.image_key in seen or row.image_key not in cache:
            continue
        seen.add(row.image_key)
        group = sliced if pixels.plan(row.width, row.height).grid else whole
        group.append({**prediction, "uri": row.uri, "image_key": row.image_key})
    num = settings.report.num_figures
    num_whole = min(len(whole), max(num // 2, num - len(sliced)))
    return [*sliced[: num - num_whole], *whole[:num_whole]]


def _thumbnails(settings: RunSettings, variants: Sequence[RunResult]) -> dict[str, Image.Image]:
    index = DatasetIndex.latest(index_uri(settings))
    uris = {row.name: row.uri for row in index.rows() if row.status == "ok"} if index else {}
    names = {row.image for row in choose_predictions(variants)} & uris.keys()
    return {name: _open(uris[name], settings) for name in names}


def _open(uri: str, settings: RunSettings) -> Image.Image:
    return decode_image(read_image_file(uri), max_pixels=settings.data.max_pixels)


if __name__ == "__main__":
    sys.exit(stage_main("report", _DESCRIPTION, run, plan))
