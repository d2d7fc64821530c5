"""Stage 3: a finished model answers held-out questions; answers and scores become tables."""

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data import ActorPoolStrategy

from meteor import storage
from meteor.assembly import cache_uri, cache_version, identity_of, open_index, pixel_settings
from meteor.cache import DatasetIndex, FeatureCache
from meteor.config import RunSettings, mathematical_settings, settings_digest
from meteor.data.features import FeatureSource, PixelSettings
from meteor.data.table import IndexedImage
from meteor.errors import BadImageError, CacheError, SettingsError
from meteor.evaluation.answer import Answerer, Question, last_answer
from meteor.evaluation.scoring import score_row, score_table
from meteor.train.build import DTYPES
from pipelines.inputs import SampleSet, indexed_images, load_set, open_features, quarantine_into, uris_by_key
from pipelines.preparation import prepare
from pipelines.runtime import Counter, num_blocks, progress, worker_environment
from pipelines.stage import StageRun, Summary, canonical, stage_main, timed

_LOG = logging.getLogger(__name__)
_DESCRIPTION = """Answer the questions of data.evaluate greedily and score them: exact match, over all and by type of question.
A question whose picture is quarantined counts as wrong and is reported."""


def run(settings: RunSettings) -> Summary:
    """Answer, score, write ``predictions.parquet`` and ``scores.json``."""
    with timed() as seconds:
        model_uri, model_digest = find_model(settings)
        sets = load_question_sets(settings)
        stage = find_run(settings)
        finished = stage.finished()
        if finished:
            return stage.reuse(finished)
        index, cache = open_index(settings), open_cache(settings)
        stage.start(parent={"uri": model_uri, "digest": model_digest}, cache=cache.uri, cache_key=cache.identity.key)
        with stage.tracked(canonical({"evaluate": mathematical_settings(settings.evaluate)})) as log:
            log.cache(cache, context="evaluation")
            questions, quarantined = find_questions(settings, sets, index, cache)
            predictions = answer(settings, questions, model_uri, cache, uris_by_key(index.rows()))
            rows = [_row(name, q, predictions[name, q.id], "") for name, q in questions]
            rows += [_row(name, q, "", reason) for name, q, reason in quarantined]
            scores = {one.name: score_table([row for row in rows if row["set"] == one.name]) for one in sets}
            _write(stage.uri, rows, scores)
            metrics = {f"{name}/exact_match": score["exact_match"] for name, score in scores.items()}
            metrics |= {
                f"{name}/{kind or 'other'}": part["exact_match"]
                for name, score in scores.items()
                for kind, part in score["by_type"].items()
            }
            log.metrics(metrics, pipeline=True)
            log.file("scores.json")
        elapsed = seconds()
        counts = {"questions": len(rows), "quarantined": len(quarantined), "questions_per_s": len(questions) / elapsed}
        counts |= {f"exact_match {name}": score["exact_match"] for name, score in scores.items()}
        results = {"predictions": storage.join(stage.uri, "predictions.parquet"), "run": stage.uri, "model": model_uri}
        return stage.finish(Summary("evaluate", counts, elapsed, results))


def plan(settings: RunSettings) -> str:
    model_uri, _ = find_model(settings)
    lines = ["evaluate: plan", f"  model      {model_uri}"]
    lines += [
        f"  {one.name:<10} {len(one.samples):,} questions, {len(one.problems)} unusable records"
        for one in load_question_sets(settings)
    ]
    return "\n".join(lines)


def load_question_sets(settings: RunSettings) -> list[SampleSet]:
    if not settings.data.evaluate:
        raise SettingsError("data.evaluate names no question set")
    return [load_set(name, uri) for name, uri in settings.data.evaluate.items()]


def find_run(settings: RunSettings) -> StageRun:
    """The folder that an evaluation of these settings, this model and these pictures has."""
    _, model_digest = find_model(settings)
    index = open_index(settings)
    content = {
        "model": model_digest,
        "evaluate": mathematical_settings(settings.evaluate),
        "dtype": settings.llm.dtype,
        "sets": {one.name: [one.digest, index.digest(one.image_names)] for one in load_question_sets(settings)},
    }
    return StageRun(settings, "evaluate", settings_digest(canonical(content)))


def open_cache(settings: RunSettings) -> FeatureCache:
    """The version that an evaluation reads which starts now."""
    uri = cache_uri(settings, identity_of(settings))
    return FeatureCache.open(uri, version=cache_version(settings, uri))


def find_model(settings: RunSettings) -> tuple[str, str]:
    """URI and digest of the model to evaluate: the one named, or this run's own stage 2.

    Raises:
        SettingsError: stage 2 has not finished.
    """
    named = settings.evaluate.model
    if named:
        return named, settings_digest(storage.read_json(storage.join(named, "config.json")))
    prepared = prepare(settings, "finetune")
    summary = prepared.run.finished()
    if summary is None:
        raise SettingsError("stage 2 of this run has not finished: run finetune first, or set evaluate.model")
    return summary.results["model"], prepared.run.digest


def find_questions(
    settings: RunSettings, sets: Sequence[SampleSet], index: DatasetIndex, cache: FeatureCache
) -> tuple[list[tuple[str, Question]], list[tuple[str, Question, str]]]:
    """(set, question) pairs to answer, and (set, question, reason) of those whose picture is quarantined.

    Raises:
        CacheError: a picture has not been indexed or encoded.
        SettingsError: records of a question set cannot be used.
    """
    names = set().union(*(one.image_names for one in sets))
    images = quarantine_into(indexed_images(index, names), cache.quarantined())
    pixels = pixel_settings(settings)
    questions, quarantined = [], []
    for one in sets:
        if one.problems:
            problem = one.problems[0]
            raise SettingsError(
                f"{one.uri}: {len(one.problems)} records cannot be used, for example {problem.sample_id}: {problem.message}"
            )
        for sample in one.samples[: settings.evaluate.limit]:
            reasons = [_reason(name, images, pixels) for name in sample.images]
            keys = tuple(images[name].image_key for name in sample.images)
            question = Question(sample.id, sample, last_answer(sample.turns), keys)
            reason = next(filter(None, reasons), "")
            if reason:
                quarantined.append((one.name, question, reason))
            else:
                questions.append((one.name, question))
    return questions, quarantined


def _reason(name: str, images: Mapping[str, IndexedImage], pixels: PixelSettings) -> str:
    """Why a picture is quarantined; "" where it is not."""
    if name not in images:
        raise CacheError(f"picture {name!r} is not in the dataset index: run cache_features with this question set")
    if images[name].reason:
        return images[name].reason
    try:
        pixels.plan(images[name].width, images[name].height)
    except BadImageError as error:
        return error.reason
    return ""


def answer(
    settings: RunSettings,
    questions: Sequence[tuple[str, Question]],
    model_uri: str,
    cache: FeatureCache,
    image_uris: Mapping[str, str],
) -> dict[tuple[str, str], str]:
    """Answers by (set, question id), spread over actors; questions of similar length share a batch."""
    if not questions:
        return {}
    runtime, options = settings.runtime, settings.evaluate
    ordered = sorted(questions, key=lambda pair: (len(pair[1].image_keys), len(pair[1].text)))
    table = [{"position": i} for i in range(len(ordered))]
    counter = Counter.remote()
    shared = ray.put([question for _, question in ordered])
    answers: dict[tuple[str, str], str] = {}
    with progress(f"[{settings.name}] questions answered:", len(ordered), lambda: ray.get(counter.count.remote())):
        dataset = ray.data.from_items(
            table, override_num_blocks=num_blocks(len(table), options.batch_size)
        ).map_batches(
            AnswerActor,
            fn_constructor_kwargs={
                "settings": settings,
                "model_uri": model_uri,
                "cache": (cache.uri, cache.version),
                "image_uris": dict(image_uris) if options.features == "live" else {},
                "questions": shared,
                "counter": counter,
            },
            batch_size=options.batch_size,
            batch_format="pyarrow",
            num_cpus=runtime.cpus_per_worker,
            num_gpus=runtime.gpus_per_worker or None,
            compute=ActorPoolStrategy(size=runtime.num_evaluators),
            runtime_env={"env_vars": worker_environment(runtime.gpus_per_worker)},
        )
        for row in dataset.iter_rows():
            name, question = ordered[row["position"]]
            answers[name, question.id] = row["prediction"]
    return answers


class AnswerActor:
    """Actor: a model and a feature source; answers batches of question positions."""

    def __init__(
        self,
        settings: RunSettings,
        model_uri: str,
        cache: tuple[str, int],
        image_uris: dict[str, str],
        questions: Any,
        counter: Any,
    ) -> None:
        self._questions: list[Question] = ray.get(questions)
        self._counter, self._max_new_tokens = counter, settings.evaluate.max_new_tokens
        device = "cuda" if settings.runtime.gpus_per_worker else "cpu"
        if device == "cpu":
            torch.set_num_threads(max(int(settings.runtime.cpus_per_worker), 1))
        self._answerer = Answerer(model_uri, device=device, dtype=DTYPES[settings.llm.dtype])
        self._source: FeatureSource = open_features(
            settings, settings.evaluate.features, cache=cache[0], version=cache[1], uris=image_uris, device=device
        )
        if isinstance(self._source, FeatureCache):
            self._answerer.check(self._source)

    def __call__(self, batch: pa.Table) -> pa.Table:
        positions = batch["position"].to_pylist()
        questions = [self._questions[i] for i in positions]
        answers = self._answerer.answer(questions, self._source, max_new_tokens=self._max_new_tokens)
        ray.get(self._counter.add.remote(len(positions)))
        return pa.table({"position": positions, "prediction": answers})


def _row(name: str, question: Question, prediction: str, reason: str) -> dict[str, Any]:
    row = {
        "set": name,
        "id": question.id,
        "image": ", ".join(question.sample.images),
        "type": question.sample.type,
        "question": question.text,
        "answer": question.answer,
        "prediction": prediction,
        "quarantined": bool(reason),
        "quarantine_reason": reason,
    }
    return {**row, "score": score_row(row)}


def _write(uri: str, rows: list[dict[str, Any]], scores: dict[str, Any]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    storage.write_bytes(storage.join(uri, "predictions.parquet"), sink.getvalue().to_pybytes())
    storage.write_json(storage.join(uri, "scores.json"), scores)


if __name__ == "__main__":
    sys.exit(stage_main("evaluate", _DESCRIPTION, run, plan))
