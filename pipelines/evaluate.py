"""Stage 3: a finished model answers held-out questions; answers and scores become tables."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meteor import storage
from meteor.assembly import Inputs, pixel_settings
from meteor.assembly.features import indexed_images
from meteor.assembly.sample_sets import as_samples, distinct_images
from meteor.assembly.training_stage import find_model
from meteor.cache import DatasetIndex, FeatureCache
from meteor.config import RunSettings, mathematical_settings
from meteor.data.table_plan import IndexedImage
from meteor.errors import BadImageError, CacheError, SettingsError
from meteor.evaluation.question_set import QuestionSet
from meteor.evaluation.questions import Question
from meteor.evaluation.score_table import UNTYPED, score_rows, score_table
from meteor.image.pixels import PixelSettings
from meteor.runs.folder import StageFolder, Summary
from meteor.runs.identity import identify
from pipelines.command import stage_main, timed
from pipelines.ray_parts.answering import Asked, answer
from pipelines.ray_parts.live_metrics import LiveMetrics
from pipelines.ray_parts.tracked import reuse, tracked

_DESCRIPTION = """Answer the question sets of data.evaluate greedily and score them, each with its benchmark's own metric. A
question whose image is quarantined counts as wrong and is reported. Answers are kept as they come: started again, or with
more question sets, a model is not asked twice."""
_PREDICTIONS = pa.schema(
    [
        *((name, pa.string()) for name in ("set", "id", "group", "image", "type", "question", "answer")),
        ("references", pa.list_(pa.string())),
        ("prediction", pa.string()),
        ("read_as", pa.string()),
        ("score", pa.float64()),
        ("quarantined", pa.bool_()),
        ("quarantine_reason", pa.string()),
    ]
)


def run(settings: RunSettings, inputs: Inputs | None = None) -> Summary:
    """Answer, score; writes ``predictions.parquet``, ``scores.json``, and files for those who score elsewhere."""
    with timed() as seconds:
        inputs = inputs or Inputs()
        model_uri, model_digest = find_model(settings, inputs)
        sets = load_question_sets(settings, inputs)
        folder = StageFolder(settings.output, identify(settings, "evaluate", inputs))
        finished = folder.finished()
        if finished:
            return reuse(settings, folder, finished)
        index, cache = inputs.index(settings), inputs.cache(settings)
        parent = {"uri": model_uri, "digest": model_digest}
        folder.start(settings, parent=parent, cache=cache.uri, cache_key=cache.identity.key)
        facts = {one.name: set_facts(one) for one in sets}
        params = {"evaluate": mathematical_settings(settings.evaluate), "sets": facts}
        with tracked(settings, folder, params) as log:
            log.cache(cache, context="evaluation")
            asked = find_questions(settings, sets, index, cache)
            live = LiveMetrics(settings.name, "evaluate", folder.digest)
            predictions, num_new = answer(settings, asked, (model_uri, model_digest), cache, index, live)
            provenance = {
                "model": model_uri,
                "model_digest": model_digest,
                "cache_key": cache.identity.key,
                "cache_version": cache.version,
            }
            rows, scores = [], {}
            for one in sets:
                mine = [ask for ask in asked if ask.set == one.name]
                questions = [ask.question for ask in mine]
                answers = {question.id: predictions.get((one.name, question.id), "") for question in questions}
                scored = score_rows(
                    one.name, [(ask.question, answers[ask.question.id], ask.reason) for ask in mine], one.metric
                )
                scores[one.name] = {**facts[one.name], **score_table(scored, questions, one.metric), **provenance}
                rows += scored
                _export(folder.uri, one, questions, answers)
            _write(folder.uri, rows, scores)
            log.metrics(_metrics(scores), pipeline=True)
            log.file("scores.json")
        elapsed = seconds()
        counts: dict[str, Any] = {"questions": len(rows), "answered_now": num_new}
        counts |= {"quarantined": sum(bool(ask.reason) for ask in asked), "questions_per_s": num_new / elapsed}
        counts |= {line: value for name, table in scores.items() for line, value in _lines(name, table)}
        results = {
            "predictions": storage.join(folder.uri, "predictions.parquet"),
            "run": folder.uri,
            "model": model_uri,
        }
        return folder.finish(Summary("evaluate", counts, elapsed, results))


def plan(settings: RunSettings, inputs: Inputs | None = None) -> str:
    """Say which questions would be asked of which model."""
    inputs = inputs or Inputs()
    model_uri, _ = find_model(settings, inputs)
    lines = ["evaluate: plan", f"  model      {model_uri}"]
    for one in load_question_sets(settings, inputs):
        split = f", {one.facts['split']}" if one.facts["split"] else ""
        lines.append(
            f"  {one.name:<10} {len(one.questions):,} questions ({one.benchmark.title}{split}), {one.metric.name}, up to "
            f"{longest_answer(settings, one)} tokens an answer, {len(one.problems)} unusable records"
        )
    return "\n".join(lines)


def load_question_sets(settings: RunSettings, inputs: Inputs) -> list[QuestionSet]:
    """The question sets of a run; raises SettingsError if it names none."""
    if not settings.data.evaluate:
        raise SettingsError("data.evaluate names no question set")
    return inputs.question_sets(settings)


def set_facts(one: QuestionSet) -> dict[str, Any]:
    """What a set's scores depend on besides the model, for whoever compares them."""
    first = one.questions[0].text if one.questions else ""
    return {**one.facts, "title": one.benchmark.title, "column": one.benchmark.column, "prompt": first}


def longest_answer(settings: RunSettings, one: QuestionSet) -> int:
    return settings.evaluate.max_new_tokens or one.benchmark.max_new_tokens


def find_questions(
    settings: RunSettings, sets: Sequence[QuestionSet], index: DatasetIndex, cache: FeatureCache
) -> list[Asked]:
    """All questions of all sets, in the order of their files, with their images' keys.

    Raises:
        CacheError: an image has not been indexed or encoded.
        SettingsError: records of a question set cannot be used.
    """
    images = indexed_images(index, distinct_images(map(as_samples, sets)), cache.quarantined())
    pixels, found = pixel_settings(settings), []
    for one in sets:
        if one.problems:
            problem = one.problems[0]
            raise SettingsError(
                f"{one.uri}: {len(one.problems)} records cannot be used, for example {problem.sample_id}: {problem.message}"
            )
        for question in first_questions(one, settings.evaluate.limit):
            shown = question.sample.images
            reason = next(filter(None, [_reason(name, images, pixels) for name in shown]), "")
            keys = tuple(images[name].image_key for name in shown)
            found.append(Asked(one.name, replace(question, image_keys=keys), reason, longest_answer(settings, one)))
    return found


def _reason(name: str, images: Mapping[str, IndexedImage], pixels: PixelSettings) -> str:
    """Why an image is quarantined; "" where it is not."""
    if name not in images:
        raise CacheError(f"image {name!r} is not in the dataset index: run cache_features with this question set")
    if images[name].reason:
        return images[name].reason
    try:
        pixels.plan(images[name].width, images[name].height)
    except BadImageError as error:
        return error.reason
    return ""


def first_questions(one: QuestionSet, limit: int | None) -> list[Question]:
    """The first ``limit`` questions with all their prompts; all where it is None."""
    wanted = set(list(dict.fromkeys(question.unit for question in one.questions))[:limit])
    return [question for question in one.questions if question.unit in wanted]


def _metrics(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """``<set>/<metric>``, ``<set>/<further number>`` and ``<set>/<type>``; what cannot be scored here is left out."""
    found: dict[str, float | None] = {}
    for name, table in scores.items():
        found |= {f"{name}/{table['metric']}": table["score"]}
        found |= {f"{name}/{extra}": value for extra, value in table["extra"].items()}
        found |= {f"{name}/type {kind}": part["score"] for kind, part in table["by_type"].items() if kind != UNTYPED}
    return {name: value for name, value in found.items() if value is not None}


def _lines(name: str, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What the terminal says of a set."""
    if table["score"] is None:
        yield name, "no score here: see the files beside predictions.parquet"
        return
    interval = (
        "" if table["interval"] is None else " ({:.1f} to {:.1f})".format(*(100 * end for end in table["interval"]))
    )
    facts = [table["metric"], *filter(None, [table["split"], "OCR" if table["ocr"] else ""])]
    yield name, f"{100 * table['score']:.1f}{interval}, {', '.join(facts)}"
    yield from ((f"{name} {extra}", value) for extra, value in table["extra"].items() if extra != table["metric"])


def _export(uri: str, one: QuestionSet, questions: Sequence[Question], answers: Mapping[str, str]) -> None:
    """The file for a server or a judge. The answer to a quarantined image's question is ""."""
    benchmark, wanted = one.benchmark, one.benchmark.exported_splits
    if benchmark.export is None or (wanted and one.facts["split"] not in wanted):
        return
    file, content = benchmark.export(one.folder, questions, answers)
    place = storage.join(uri, f"{one.name}_{file}")
    if file.endswith(".jsonl"):
        lines = [json.dumps(row, ensure_ascii=False) for row in content]
        storage.write_bytes(place, ("\n".join(lines) + "\n").encode())
    else:
        storage.write_json(place, content)


def _write(uri: str, rows: list[dict[str, Any]], scores: dict[str, Any]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, _PREDICTIONS), sink)
    storage.write_bytes(storage.join(uri, "predictions.parquet"), sink.getvalue().to_pybytes())
    storage.write_json(storage.join(uri, "scores.json"), scores)


if __name__ == "__main__":
    sys.exit(stage_main("evaluate", _DESCRIPTION, run, plan))
