"""Stage 3: a finished model answers held-out questions; answers and scores become tables."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data import ActorPoolStrategy

from meteor import storage
from meteor.assembly import cache_uri, cache_version, identity_of, open_index, pixel_settings, question_sets
from meteor.cache import DatasetIndex, FeatureCache
from meteor.config import RunSettings, mathematical_settings, settings_digest
from meteor.constants import GROUPING_TOKENS_PER_SUB_IMAGE
from meteor.data.features import FeatureSource, PixelSettings
from meteor.data.table import IndexedImage
from meteor.errors import BadImageError, CacheError, SettingsError
from meteor.evaluation.answer import Answerer
from meteor.evaluation.question_set import QuestionSet
from meteor.evaluation.questions import Question
from meteor.evaluation.score_table import UNTYPED, score_rows, score_table
from meteor.train.build import DTYPES
from pipelines.answers import AnswerStore, prompt_digest
from pipelines.inputs import as_samples, indexed_images, open_features, quarantine_into, uris_by_key
from pipelines.preparation import prepare
from pipelines.runtime import Counter, num_blocks, progress, worker_environment
from pipelines.stage import StageRun, Summary, canonical, stage_main, timed

_LOG = logging.getLogger(__name__)
_DESCRIPTION = """Answer the question sets of data.evaluate greedily and score them, each with its benchmark's own metric. A
question whose picture is quarantined counts as wrong and is reported. Answers are kept as they come: started again, or with
more question sets, a model is not asked twice."""
# Changes when prompts are answered otherwise: older answers are not taken then.
_METHOD = 1
_CHARACTERS_A_TOKEN = 4


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


def run(settings: RunSettings) -> Summary:
    """Answer, score; writes ``predictions.parquet``, ``scores.json``, and files for those who score elsewhere."""
    with timed() as seconds:
        model_uri, model_digest = find_model(settings)
        sets = load_question_sets(settings)
        stage = find_run(settings)
        finished = stage.finished()
        if finished:
            return stage.reuse(finished)
        index, cache = open_index(settings), open_cache(settings)
        stage.start(parent={"uri": model_uri, "digest": model_digest}, cache=cache.uri, cache_key=cache.identity.key)
        facts = {one.name: set_facts(one) for one in sets}
        with stage.tracked(canonical({"evaluate": mathematical_settings(settings.evaluate), "sets": facts})) as log:
            log.cache(cache, context="evaluation")
            questions, quarantined = find_questions(settings, sets, index, cache)
            model = (model_uri, model_digest)
            predictions, num_asked = answer(settings, sets, questions, model, cache, index)
            reasons = {(name, question.id): reason for name, question, reason in quarantined}
            asked_of = {(name, question.id): question for name, question in questions}
            asked_of |= {(name, question.id): question for name, question, _ in quarantined}
            provenance = {
                "model": model_uri,
                "model_digest": model_digest,
                "cache_key": cache.identity.key,
                "cache_version": cache.version,
            }
            rows, scores = [], {}
            for one in sets:
                asked = [
                    (question, predictions.get(key, ""), reasons.get(key, ""))
                    for key, question in asked_of.items()
                    if key[0] == one.name
                ]
                mine = score_rows(one.name, asked, one.metric)
                table = score_table(mine, [question for question, _, _ in asked], one.metric)
                scores[one.name] = {**facts[one.name], **table, **provenance}
                rows += mine
                _export(stage.uri, one, [question for question, _, _ in asked], predictions)
            _write(stage.uri, rows, scores)
            log.metrics(_metrics(scores), pipeline=True)
            log.file("scores.json")
        elapsed = seconds()
        counts: dict[str, Any] = {"questions": len(rows), "answered_now": num_asked, "quarantined": len(quarantined)}
        counts |= {"questions_per_s": num_asked / elapsed}
        counts |= {line: value for name, table in scores.items() for line, value in _lines(name, table)}
        results = {"predictions": storage.join(stage.uri, "predictions.parquet"), "run": stage.uri, "model": model_uri}
        return stage.finish(Summary("evaluate", counts, elapsed, results))


def plan(settings: RunSettings) -> str:
    model_uri, _ = find_model(settings)
    lines = ["evaluate: plan", f"  model      {model_uri}"]
    for one in load_question_sets(settings):
        split = f", {one.facts['split']}" if one.facts["split"] else ""
        lines.append(
            f"  {one.name:<10} {len(one.questions):,} questions ({one.benchmark.title}{split}), {one.metric.name}, up to "
            f"{longest_answer(settings, one)} tokens an answer, {len(one.problems)} unusable records"
        )
    return "\n".join(lines)


def load_question_sets(settings: RunSettings) -> list[QuestionSet]:
    if not settings.data.evaluate:
        raise SettingsError("data.evaluate names no question set")
    return question_sets(settings)


def set_facts(one: QuestionSet) -> dict[str, Any]:
    """What a set's scores depend on besides the model, for whoever compares them."""
    first = one.questions[0].text if one.questions else ""
    return {**one.facts, "title": one.benchmark.title, "column": one.benchmark.column, "prompt": first}


def longest_answer(settings: RunSettings, one: QuestionSet) -> int:
    return settings.evaluate.max_new_tokens or one.benchmark.max_new_tokens


def find_run(settings: RunSettings) -> StageRun:
    """The folder that an evaluation of these settings, this model and these pictures has."""
    _, model_digest = find_model(settings)
    index = open_index(settings)
    content = {
        "model": model_digest,
        "evaluate": mathematical_settings(settings.evaluate),
        "dtype": settings.llm.dtype,
        "sets": {one.name: [scoring_digest(one), _index_digest(index, one)] for one in load_question_sets(settings)},
    }
    return StageRun(settings, "evaluate", settings_digest(canonical(content)))


def scoring_digest(one: QuestionSet) -> str:
    """Of what is asked and of how it is scored."""
    return settings_digest([one.digest, one.facts, one.metric.name, one.metric.version])


def _index_digest(index: DatasetIndex, one: QuestionSet) -> str:
    return index.digest(as_samples(one).image_names)


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
        files = {info.uri.removeprefix(named): [info.size_bytes, info.etag] for info in storage.list_objects(named)}
        if not files:
            raise SettingsError(f"evaluate.model={named!r} holds no model: give the directory that finetune leaves")
        return named, settings_digest(files)
    prepared = prepare(settings, "finetune")
    summary = prepared.run.finished()
    if summary is None:
        raise SettingsError("stage 2 of this run has not finished: run finetune first, or set evaluate.model")
    return summary.results["model"], prepared.run.digest


def find_questions(
    settings: RunSettings, sets: Sequence[QuestionSet], index: DatasetIndex, cache: FeatureCache
) -> tuple[list[tuple[str, Question]], list[tuple[str, Question, str]]]:
    """(set, question) pairs to answer, and (set, question, reason) of those whose picture is quarantined.

    Raises:
        CacheError: a picture has not been indexed or encoded.
        SettingsError: records of a question set cannot be used.
    """
    names = set().union(*(as_samples(one).image_names for one in sets))
    images = quarantine_into(indexed_images(index, names), cache.quarantined())
    pixels = pixel_settings(settings)
    questions, quarantined = [], []
    for one in sets:
        if one.problems:
            problem = one.problems[0]
            raise SettingsError(
                f"{one.uri}: {len(one.problems)} records cannot be used, for example {problem.sample_id}: {problem.message}"
            )
        for asked in first_questions(one, settings.evaluate.limit):
            reasons = [_reason(name, images, pixels) for name in asked.sample.images]
            keys = tuple(images[name].image_key for name in asked.sample.images)
            question = replace(asked, image_keys=keys)
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


def first_questions(one: QuestionSet, limit: int | None) -> list[Question]:
    """The first ``limit`` questions with all their prompts; all where it is None."""
    wanted = set(list(dict.fromkeys(question.unit for question in one.questions))[:limit])
    return [question for question in one.questions if question.unit in wanted]


def answer(
    settings: RunSettings,
    sets: Sequence[QuestionSet],
    questions: Sequence[tuple[str, Question]],
    model: tuple[str, str],
    cache: FeatureCache,
    index: DatasetIndex,
) -> tuple[dict[tuple[str, str], str], int]:
    """Answers by (set, question id), those that are known taken as they are; and how many were asked now."""
    store = AnswerStore(_answers_uri(settings, model[1], cache))
    longest = {one.name: longest_answer(settings, one) for one in sets}
    prompts = {(name, one.id): prompt_digest(one, longest[name]) for name, one in questions}
    known = store.read()
    if num_known := sum(prompt in known for prompt in prompts.values()):
        _LOG.info("[%s] %d of %d questions were answered before", settings.name, num_known, len(prompts))
    # Each prompt once, also where two sets ask it.
    missing = {prompts[name, one.id]: (longest[name], one) for name, one in questions}
    missing = {prompt: one for prompt, one in missing.items() if prompt not in known}
    if missing:
        try:
            for found in _ask(settings, missing, model[0], cache, index):
                store.add(found)
                known |= found
        finally:
            store.flush()
    return {key: known[prompt] for key, prompt in prompts.items()}, len(missing)


def _answers_uri(settings: RunSettings, model_digest: str, cache: FeatureCache) -> str:
    """Answers depend on the model, its type, and the features; not on batches, and not on which sets are asked."""
    content = [_METHOD, model_digest, settings.llm.dtype, settings.evaluate.features, cache.identity.key, cache.codec]
    return storage.join(settings.output, "answers", settings_digest(content)[:16])


def _ask(
    settings: RunSettings,
    missing: Mapping[str, tuple[int, Question]],
    model_uri: str,
    cache: FeatureCache,
    index: DatasetIndex,
) -> Iterator[dict[str, str]]:
    """Prompt -> answer, as they come from actors; questions of similar length share a batch, the longest come first."""
    runtime, options = settings.runtime, settings.evaluate
    lengths = _lengths(settings, missing, index)
    ordered = sorted(missing.items(), key=lambda item: (item[1][0], lengths[item[0]]), reverse=True)
    counter = Counter.remote()
    shared = ray.put([one for _, one in ordered])
    with progress(f"[{settings.name}] questions answered:", len(ordered), lambda: ray.get(counter.count.remote())):
        dataset = ray.data.from_items(
            [{"position": i} for i in range(len(ordered))],
            override_num_blocks=num_blocks(len(ordered), options.batch_size),
        ).map_batches(
            AnswerActor,
            fn_constructor_kwargs={
                "settings": settings,
                "model_uri": model_uri,
                "cache": (cache.uri, cache.version),
                "image_uris": uris_by_key(index.rows()) if options.features == "live" else {},
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
            yield {ordered[row["position"]][0]: row["prediction"]}


def _lengths(settings: RunSettings, missing: Mapping[str, tuple[int, Question]], index: DatasetIndex) -> dict[str, int]:
    """Prompt -> how long it is, nearly: what batches are made by need not be exact."""
    pixels = pixel_settings(settings)
    wanted = {key for _, question in missing.values() for key in question.image_keys}
    sizes = {row.image_key: (row.width, row.height) for row in index.rows() if row.image_key in wanted}
    num_sub_images = {key: len(pixels.plan(*size).patch_grids) for key, size in sizes.items()}
    return {
        prompt: GROUPING_TOKENS_PER_SUB_IMAGE * sum(num_sub_images[key] for key in question.image_keys)
        + sum(len(turn.text) for turn in question.sample.turns) // _CHARACTERS_A_TOKEN
        for prompt, (_, question) in missing.items()
    }


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
        self._questions: list[tuple[int, Question]] = ray.get(questions)
        self._counter = counter
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
        positions, answers = batch["position"].to_pylist(), []
        # Sorted by the longest answer too: nearly always one group.
        for longest, group in groupby((self._questions[i] for i in positions), key=lambda one: one[0]):
            questions = [question for _, question in group]
            answers += self._answerer.answer(questions, self._source, max_new_tokens=longest)
        ray.get(self._counter.add.remote(len(positions)))
        return pa.table({"position": positions, "prediction": answers})


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


def _export(
    uri: str, one: QuestionSet, questions: Sequence[Question], predictions: Mapping[tuple[str, str], str]
) -> None:
    """The file for a server or a judge. A quarantined picture's question has the answer ""."""
    benchmark = one.benchmark
    if benchmark.export is None or (benchmark.exported_splits and one.facts["split"] not in benchmark.exported_splits):
        return
    answers = {question.id: predictions.get((one.name, question.id), "") for question in questions}
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
