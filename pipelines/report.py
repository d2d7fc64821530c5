"""Stage 4: what the runs found, as Markdown and one self-contained HTML page."""

import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from meteor import storage
from meteor.assembly import index_uri, pixel_settings
from meteor.cache import DatasetIndex, FeatureCache
from meteor.config import RunSettings, load_run, resolve_paths
from meteor.errors import MeteorError, SettingsError, TrackingError
from meteor.evaluation.answer import Answerer
from meteor.evaluation.selection import SelectedPatches, select_patches
from meteor.image.decode import decode_image
from meteor.report import (
    SelectionPanel,
    StageRun,
    SubImageScores,
    VariantResult,
    choose_predictions,
    read_stage_run,
    write_report,
)
from pipelines import cache_features, evaluate
from pipelines.preparation import prepare
from pipelines.stage import Summary, stage_main, timed
from pipelines.stage_log import make_tracker, pipeline_digest

_LOG = logging.getLogger(__name__)
_DESCRIPTION = """Lay settings, loss curves, scores, throughput and figures of this run, and of those in report.compare, side by
side in report.md and report.html. What has not run is said to be missing."""


def run(settings: RunSettings) -> Summary:
    """Collect, draw, write."""
    with timed() as seconds:
        runs = [settings, *(resolve_paths(load_run(path)) for path in settings.report.compare)]
        variants = [collect(one) for one in runs]
        if not any(variant.stages for variant in variants):
            raise SettingsError("no stage of this run has started: there is nothing to report")
        panels = [panel for one, variant in zip(runs, variants, strict=True) for panel in draw_panels(one, variant)]
        uri = storage.join(settings.output, "report", settings.name)
        paths = write_report(
            uri,
            title=settings.name,
            variants=variants,
            panels=panels,
            cache=cache_facts(settings),
            thumbnails=_thumbnails(settings, variants),
        )
        try:
            _log(settings, [paths.markdown, paths.html])
        except TrackingError as error:
            _LOG.warning("%s. The report is written; run this stage again to keep it in MLflow as well", error)
        counts = {"variants": len(variants), "figures_of_pictures": len(panels)}
        return Summary("report", counts, seconds(), {"markdown": paths.markdown, "html": paths.html})


def _log(settings: RunSettings, paths: Sequence[str]) -> None:
    tracker = make_tracker(settings)
    parent = tracker.run(settings.name, pipeline_digest(settings), tags={"meteor.kind": "pipeline"})
    for path in paths:
        tracker.log_file(parent, f"report/{path.rpartition('/')[2]}", storage.read_bytes(path))
    tracker.finish(parent)


def plan(settings: RunSettings) -> str:
    variants = [collect(one) for one in [settings, *(resolve_paths(load_run(p)) for p in settings.report.compare)]]
    lines = ["report: plan"]
    for variant in variants:
        done = [stage for stage, one in variant.stages.items() if one.finished]
        lines.append(f"  {variant.name}: finished {', '.join(done) or 'nothing'}")
    return "\n".join(lines)


def collect(settings: RunSettings) -> VariantResult:
    """Everything that one run's stages left behind; a stage that has not run is left out."""
    stages: dict[str, StageRun] = {}
    for stage in ("pretrain", "finetune"):
        found = _find(lambda stage=stage: prepare(settings, stage).run.uri)
        if found and storage.exists(storage.join(found, "run.json")):
            stages[stage] = read_stage_run(found)
    found = _find(lambda: evaluate.find_run(settings).uri)
    predictions = scores = None
    if found and storage.exists(storage.join(found, "summary.json")):
        stages["evaluate"] = read_stage_run(found)
        scores = storage.read_json(storage.join(found, "scores.json"))
        table = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(found, "predictions.parquet"))))
        predictions = table.to_pylist()
    return VariantResult(
        name=settings.name,
        stages=stages,
        scores=scores,
        predictions=predictions,
        num_projector_parameters=_num_projector_parameters(stages),
        num_visual_tokens_per_image=_tokens_per_image(stages),
    )


def _find(locate: Any) -> str | None:
    """The URI that ``locate`` finds; None where an earlier stage is missing, which is logged."""
    try:
        return locate()
    except MeteorError as error:
        _LOG.info("left out of the report: %s", error)
        return None


def _num_projector_parameters(stages: dict[str, StageRun]) -> int | None:
    """Counted in stage 1's own file, from its header."""
    summary = stages["pretrain"].summary if "pretrain" in stages else None
    if not summary:
        return None
    uri = summary["results"]["projector"]
    size = int.from_bytes(storage.read_range(uri, 0, 8), "little")
    header = json.loads(storage.read_range(uri, 8, size))
    return sum(torch.Size(one["shape"]).numel() for name, one in header.items() if name != "__metadata__")


def _tokens_per_image(stages: dict[str, StageRun]) -> float | None:
    """Mean visual tokens of a picture in stage 2, separators included as they are in the sequence."""
    summary = stages["finetune"].summary if "finetune" in stages else None
    totals = summary["extra"]["totals"] if summary else None
    return totals["visual_tokens"] / totals["images"] if totals and totals["images"] else None


def cache_facts(settings: RunSettings) -> dict[str, Any] | None:
    """What the report says about the cache; None where there is none."""
    found = _find(lambda: cache_features.find_run(settings).uri)
    if not found or not storage.exists(storage.join(found, "summary.json")):
        return None
    summary = storage.read_json(storage.join(found, "summary.json"))
    counts, extra = summary["counts"], summary["extra"]
    return {
        "num_pictures": counts["pictures"],
        "num_distinct_pictures": counts["distinct_pictures"],
        "num_sub_images_in_cache": counts["sub_images_cached"],
        "payload_bytes": counts["payload_bytes"],
        "codec": extra["codec"],
        "cache_key": extra["cache_key"],
        "encoder": settings.vision.path.rpartition("/")[2],
        "encoder_digest": extra["identity"]["encoder_digest"],
        "num_quarantined": counts["quarantined"],
        "quarantine_reasons": extra["reasons"],
    }


def draw_panels(settings: RunSettings, variant: VariantResult) -> list[SelectionPanel]:
    """Selection figures of some evaluated pictures, for a projector that selects."""
    if not variant.predictions or settings.report.num_figures == 0:
        return []
    model_uri, _ = evaluate.find_model(settings)
    answerer = Answerer(model_uri, device="cpu", dtype=torch.float32)
    cache = evaluate.open_cache(settings)
    panels = []
    for row in _pick(settings, variant.predictions, cache):
        image = cache.get(row["image_key"])
        patches = select_patches(answerer.model, image)
        if patches[0].combined is None:
            return []
        panels.append(
            SelectionPanel(
                title=f"{settings.name}: {row['image']}",
                question=row["question"],
                answer=row["answer"],
                prediction=row["prediction"],
                image=_open(row["uri"], settings),
                plan=pixel_settings(settings).plan(image.width, image.height),
                sub_images=tuple(_scores(one) for one in patches),
                variant=settings.name,
            )
        )
    return panels


def _scores(patches: SelectedPatches) -> SubImageScores:
    assert patches.combined is not None
    return SubImageScores(patches.combined, patches.kept, patches.visual, patches.native)


def _pick(settings: RunSettings, predictions: Sequence[dict[str, Any]], cache: FeatureCache) -> list[dict[str, Any]]:
    """Questions about one picture each, sliced and unsliced in turn, each picture once; the same ones every time."""
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


def _thumbnails(settings: RunSettings, variants: Sequence[VariantResult]) -> dict[str, Image.Image]:
    index = DatasetIndex.latest(index_uri(settings))
    uris = {row.name: row.uri for row in index.rows() if row.status == "ok"} if index else {}
    names = {row.image for row in choose_predictions(variants)} & uris.keys()
    return {name: _open(uris[name], settings) for name in names}


def _open(uri: str, settings: RunSettings) -> Image.Image:
    return decode_image(storage.read_bytes(uri), max_pixels=settings.data.max_pixels)


if __name__ == "__main__":
    sys.exit(stage_main("report", _DESCRIPTION, run, plan))
