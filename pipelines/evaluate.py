"""Stage 3, evaluate: a finished model answers questions; answers and scores become tables."""

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
from meteor.assembly.recipe import check_answer_counts
from meteor.assembly.sample_sets import as_samples, distinct_images
from meteor.assembly.training_stage import find_model
from meteor.cache import DatasetIndex, FeatureCache
from meteor.config import RunSettings, mathematical_settings
from meteor.data.indexed_images import IndexedImage
from meteor.data.samples import SampleProblem
from meteor.errors import BadImageError, CacheError, QuarantineLimitError, SettingsError
from meteor.evaluation.question_set import QuestionSet
from meteor.evaluation.questions import Question
from meteor.evaluation.score_table import UNTYPED, score_rows, score_table, unusable_rows
from meteor.image.budget import visual_token_budget
from meteor.image.pixels import PixelSettings
from meteor.projector.answering import AS_TRAINED, AnswerSelection
from meteor.report import RunResult
from meteor.report.paper_columns import paper_numbers
from meteor.runs.folder import StageFolder, Summary
from meteor.runs.identity import identify
from pipelines.command import stage_main, timed
from pipelines.ray_parts.answering import SetQuestion, answer
from pipelines.ray_parts.answers import Answer
from pipelines.ray_parts.live_metrics import LiveMetrics
from pipelines.ray_parts.runtime import job_id
from pipelines.ray_parts.tracked import reuse, tracked

_NO_ANSWER = Answer("")
_DESCRIPTION = """Answer the question sets of data.evaluate greedily and score each set with the metric of its benchmark. A
question that cannot be read, or whose image is quarantined, counts as wrong and is reported. Answers are kept as they
arrive: a second start, or more question sets, only answers new questions."""
_PREDICTIONS = pa.schema(
    [
        *((name, pa.string()) for name in ("set", "id", "group", "image", "type", "question", "answer")),
        ("references", pa.list_(pa.string())),
        ("prediction", pa.string()),
        ("read_as", pa.string()),
        ("score", pa.float64()),
        ("global_only", pa.bool_()),
        ("quarantined", pa.bool_()),
        ("quarantine_reason", pa.string()),
    ]
)


def run(inputs: Inputs) -> Summary:
    """Answer and score; write ``predictions.parquet``, ``scores.json``, and files for benchmarks that are scored elsewhere."""
    with timed() as seconds:
        settings = inputs.settings
        check_answer_counts(settings)
        model_uri, model_digest = find_model(inputs)
        sets = load_question_sets(inputs)
        folder = StageFolder(settings.output, identify(inputs, "evaluate"))
        finished = folder.finished()
        if finished:
            return reuse(settings, folder, finished)
        index, cache = inputs.index(), inputs.cache()
        parent = {"uri": model_uri, "digest": model_digest}
        folder.start(settings, job=job_id(), parent=parent, cache=cache.uri, cache_key=cache.identity.key)
        facts = {question_set.name: set_facts(settings, question_set) for question_set in sets}
        params = {"evaluate": mathematical_settings(settings.evaluate), "sets": facts}
        with tracked(settings, folder, params) as log:
            log.cache(cache, context="evaluation")
            questions = find_questions(settings, sets, index, cache)
            live = LiveMetrics(settings.name, "evaluate", folder.digest)
            answered = answer(settings, questions, (model_uri, model_digest), cache, index, live, folder.check_claim)
            questions = answered.questions
            for question_set in sets:
                of_set = [question for question in questions if question.set == question_set.name]
                _check_share_of_bad(settings, question_set, len(of_set), answered.problems(question_set.name))
            provenance = {
                "model": model_uri,
                "model_digest": model_digest,
                "cache_key": cache.identity.key,
                "cache_version": cache.version,
            }
            rows, scores = [], {}
            for question_set in sets:
                name, metric = question_set.name, question_set.metric
                of_set = [question for question in questions if question.set == name]
                plain, problems = [each.question for each in of_set], counted_problems(settings, question_set)
                found = {question.id: answered.answers.get((name, question.id), _NO_ANSWER) for question in plain}
                answers = {question_id: answer.text for question_id, answer in found.items()}
                scored = score_rows(
                    name, [(each.question, answers[each.question.id], each.reason) for each in of_set], metric
                )
                for row in scored:
                    row["global_only"] = found[row["id"]].global_only
                table = score_table(scored, plain, metric, num_unusable=len(problems))
                table["num_global_only"] = len({row["group"] for row in scored if row["global_only"]})
                scores[name] = {**facts[name], **table, **provenance}
                rows += [*scored, *unusable_rows(name, problems, is_scored=table["score"] is not None)]
                _export(folder.uri, question_set, plain, answers)
            folder.check_claim()
            _write(folder.uri, rows, scores)
            log.metrics(_metrics(scores), pipeline=True)
            log.file("scores.json")
        elapsed = seconds()
        counts: dict[str, Any] = {"questions": len(rows), "answered_now": answered.num_new}
        counts |= {"quarantined": sum(row["quarantined"] for row in rows)}
        counts |= {"questions_per_s": answered.num_new / elapsed}
        counts |= {line: value for name, table in scores.items() for line, value in _lines(name, table)}
        results = {
            "predictions": storage.join(folder.uri, "predictions.parquet"),
            "run": folder.uri,
            "model": model_uri,
        }
        # Another model may have another projector than the run's settings.
        extra = {} if settings.evaluate.model else {"visual_tokens_share": tokens_share(settings, questions, index)}
        return folder.finish(Summary("evaluate", counts, elapsed, results, extra=extra))


def plan(inputs: Inputs) -> str:
    """Describe the questions that `run` would answer, and the model."""
    check_answer_counts(inputs.settings)
    model_uri, _ = find_model(inputs)
    lines = ["evaluate: plan", f"  model      {model_uri}"]
    for question_set in load_question_sets(inputs):
        options = ", ".join(filter(None, [question_set.benchmark.title, *_options(question_set.facts)]))
        lines.append(
            f"  {question_set.name:<10} {len(question_set.questions):,} questions ({options}), "
            f"{question_set.metric.name}, up to {longest_answer(inputs.settings, question_set)} tokens per answer, "
            f"{len(question_set.problems)} unusable records"
        )
    return "\n".join(lines)


def load_question_sets(inputs: Inputs) -> list[QuestionSet]:
    """Read the question sets of a run; raise SettingsError if it names none."""
    if not inputs.settings.data.evaluate:
        raise SettingsError("data.evaluate names no question set: add a question set, or skip this stage")
    return inputs.question_sets()


def set_facts(settings: RunSettings, question_set: QuestionSet) -> dict[str, Any]:
    """Return everything that a set's scores depend on besides the model, for comparisons with other evaluations."""
    trained = {**settings.projector.settings, "sub_images": settings.finetune.sub_images}
    # The settings of another run's model are not those of this run.
    trained = {} if settings.evaluate.model else trained
    changes = vars(find_selection(settings, question_set.name))
    return {
        **question_set.facts,
        "title": question_set.benchmark.title,
        "scored_by": question_set.scored_by,
        "limit": settings.evaluate.limit,
        "selection": {key: new for key, new in changes.items() if new is not None and new != trained.get(key)},
        "prompt": question_set.questions[0].text if question_set.questions else "",
    }


def longest_answer(settings: RunSettings, question_set: QuestionSet) -> int:
    """Return the largest number of tokens in an answer: the setting, else the benchmark's own limit."""
    return settings.evaluate.max_new_tokens or question_set.benchmark.max_new_tokens


def find_selection(settings: RunSettings, set_name: str) -> AnswerSelection:
    """Return the changes of the token selection for a question set: the set's own, else those of all sets."""
    own = settings.evaluate.sets.get(set_name)
    return replace(shared_selection(settings), **own.model_dump(exclude_none=True) if own else {})


def shared_selection(settings: RunSettings) -> AnswerSelection:
    """Return the changes of the token selection for question sets without changes of their own."""
    evaluate = settings.evaluate
    return AnswerSelection(evaluate.k, evaluate.visual_weight, evaluate.sub_images)


def tokens_share(settings: RunSettings, questions: Sequence[SetQuestion], index: DatasetIndex) -> float:
    """Return the visual tokens of all questions as a share of those without changes of the token selection."""
    projector, pixels = settings.projector, pixel_settings(settings)
    answerable = [each for each in questions if not each.reason]
    if all(each.selection == AS_TRAINED for each in answerable):
        return 1.0
    keys = {key for each in answerable for key in each.question.image_keys}
    grids = {
        row.image_key: pixels.plan(row.width, row.height).patch_grids for row in index.rows() if row.image_key in keys
    }

    def count(selection: AnswerSelection, image_keys: Sequence[str]) -> int:
        budget = visual_token_budget(projector.name, projector.settings, k=selection.k)
        only_global = (selection.sub_images or settings.finetune.sub_images) == "global"
        return sum(sum(budget(grids[key][:1] if only_global else grids[key])) for key in image_keys)

    trained = sum(count(AS_TRAINED, each.question.image_keys) for each in answerable)
    return sum(count(each.selection, each.question.image_keys) for each in answerable) / trained if trained else 1.0


def find_questions(
    settings: RunSettings, sets: Sequence[QuestionSet], index: DatasetIndex, cache: FeatureCache
) -> list[SetQuestion]:
    """Return all questions of all sets in the order of their files, with the keys of their images.

    Raises:
        CacheError: an image has not been indexed or encoded.
        QuarantineLimitError: too many records of a question set cannot be used.
    """
    images = indexed_images(index, distinct_images(map(as_samples, sets)), cache.quarantined())
    pixels, found = pixel_settings(settings), []
    for question_set in sets:
        num_records = len(question_set.questions) + len(question_set.problems)
        _check_share_of_bad(settings, question_set, num_records, question_set.problems)
        longest = longest_answer(settings, question_set)
        for question in first_questions(question_set, settings.evaluate.limit):
            shown = question.sample.images
            reason = next(filter(None, [_reason(name, images, pixels) for name in shown]), "")
            keys = tuple(images[name].image_key for name in shown)
            of_set = find_selection(settings, question_set.name)
            with_keys = replace(question, image_keys=keys)
            found.append(SetQuestion(question_set.name, with_keys, reason, longest, of_set))
    return found


def counted_problems(settings: RunSettings, question_set: QuestionSet) -> tuple[SampleProblem, ...]:
    """Return the records that count as wrong questions: all that cannot be used; none if only some questions are asked."""
    return question_set.problems if settings.evaluate.limit is None else ()


def _check_share_of_bad(
    settings: RunSettings, question_set: QuestionSet, num_all: int, problems: Sequence[SampleProblem]
) -> None:
    if settings.data.tolerates(len(problems), num_all) and len(problems) < num_all:
        return
    example = f", for example {problems[0].sample_id}: {problems[0].message}" if problems else ""
    raise QuarantineLimitError(
        f"{question_set.uri}: {len(problems)} of {num_all} questions cannot be asked{example}. See `meteor data check`, repair "
        "the file, or raise data.max_bad_share: a question that cannot be asked counts as wrong"
    )


def _reason(name: str, images: Mapping[str, IndexedImage], pixels: PixelSettings) -> str:
    """Return the reason for which an image is quarantined; "" if it is not."""
    if name not in images:
        raise CacheError(f"image {name!r} is not in the dataset index: run cache_features with this question set")
    if images[name].reason:
        return images[name].reason
    try:
        pixels.plan(images[name].width, images[name].height)
    except BadImageError as error:
        return error.reason
    return ""


def first_questions(question_set: QuestionSet, limit: int | None) -> list[Question]:
    """Return the first ``limit`` questions with all their prompts; all questions if ``limit`` is None."""
    units = set(list(dict.fromkeys(question.unit for question in question_set.questions))[:limit])
    return [question for question in question_set.questions if question.unit in units]


def _metrics(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return numbers for MLflow by name: ``<set>/<metric>``, ``<set>/<extra number>`` and ``<set>/type <type>``.

    Sets that are scored elsewhere have none. ``paper/average`` is the average that the report shows beside the paper's.
    """
    found: dict[str, float | None] = {**paper_numbers(RunResult("", {}, scores))}
    for name, table in scores.items():
        found |= {f"{name}/{table['metric']}": table["score"]}
        found |= {f"{name}/{extra}": value for extra, value in table["extra"].items()}
        found |= {f"{name}/type {kind}": part["score"] for kind, part in table["by_type"].items() if kind != UNTYPED}
    return {name: value for name, value in found.items() if value is not None}


def _lines(name: str, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the terminal's lines about a set, as (label, value)."""
    if table["score"] is None:
        yield name, "scored elsewhere: see the files beside predictions.parquet"
        return
    interval = (
        "" if table["interval"] is None else " ({:.1f} to {:.1f})".format(*(100 * end for end in table["interval"]))
    )
    facts = [table["metric"], *_options(table)]
    if table["num_global_only"]:
        facts.append(f"{table['num_global_only']} of {table['num_questions']} questions by global views alone")
    yield name, f"{100 * table['score']:.1f}{interval}, {', '.join(facts)}"
    yield from ((f"{name} {extra}", value) for extra, value in table["extra"].items() if extra != table["metric"])


def _options(facts: Mapping[str, Any]) -> list[str]:
    """Return the options of a set that change its scores most, in words."""
    side = facts["long_side"]
    return [
        text for text in (facts["split"], "OCR" if facts["ocr"] else "", f"long side {side}" if side else "") if text
    ]


def _export(uri: str, question_set: QuestionSet, questions: Sequence[Question], answers: Mapping[str, str]) -> None:
    """Write the file for a server or a judge; a question whose image is quarantined has the answer ""."""
    benchmark, splits = question_set.benchmark, question_set.benchmark.exported_splits
    if benchmark.export is None or (splits and question_set.facts["split"] not in splits):
        return
    file, content = benchmark.export(question_set.folder, questions, answers)
    place = storage.join(uri, f"{question_set.name}_{file}")
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
    sys.exit(stage_main("evaluate", _DESCRIPTION, run, plan, short={"--k": "evaluate.k"}))
