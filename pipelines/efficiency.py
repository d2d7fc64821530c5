"""How fast each variant of a study answers, one after the other: same hardware, same questions, nothing beside it."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import ray
import torch

from meteor import storage
from meteor.config import RunSettings, Variant, settings_digest
from meteor.errors import NotFoundError, SettingsError
from meteor.evaluation.answer import Answerer, Question
from meteor.evaluation.efficiency import describe_hardware, measure_answers
from meteor.train.build import DTYPES
from pipelines import evaluate
from pipelines.runtime import worker_environment
from pipelines.study import study_uri

_LOG = logging.getLogger(__name__)
# Changes when what is measured does: older numbers are measured again.
_METHOD = 1


def measure_variants(settings: RunSettings, variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    """Variant -> `meteor.evaluation.efficiency.Efficiency` as a dict; of its first seed, where that has a finished model.

    What was measured before on the same hardware, with the same model and questions, is taken as it is.
    """
    study = settings.study
    if study is None or not study.measure_questions or not settings.data.evaluate:
        return {}
    first = {variant.name: variant for variant in reversed(variants)}
    measured = {}
    for name in dict.fromkeys(variant.name for variant in variants):
        run = first[name].settings
        try:
            model_uri, digest = evaluate.find_model(run)
        except SettingsError:
            continue
        uri = study_uri(settings, "efficiency", f"{name}.json")
        content = _measure(run, model_uri, study.measure_questions, settings_digest([_METHOD, digest]), _read(uri))
        storage.write_json(uri, content)
        measured[name] = content["measured"]
        _LOG.info("[%s] answers: %s", name, _line(content["measured"]))
    return measured


def read_measured(settings: RunSettings, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What `measure_variants` left, of these variants."""
    found = {name: _read(study_uri(settings, "efficiency", f"{name}.json")) for name in names}
    return {name: content["measured"] for name, content in found.items() if content}


def _line(measured: dict[str, Any]) -> str:
    return (
        f"prompt of {measured['num_prompt_tokens']:.0f} tokens in {measured['prefill_s'] * 1000:.3g} ms, then "
        f"{measured['tokens_per_s']:.3g} tokens/s, {measured['memory_bytes'] / 1e9:.3g} GB"
    )


def _read(uri: str) -> dict[str, Any] | None:
    try:
        return storage.read_json(uri)
    except NotFoundError:
        return None


def _measure(
    run: RunSettings, model_uri: str, num_questions: int, model_digest: str, before: dict[str, Any] | None
) -> dict[str, Any]:
    runtime = run.runtime
    # A process of its own each time: its peak of memory counts from its start.
    task = ray.remote(max_calls=1)(_measure_in_worker).options(
        num_cpus=runtime.cpus_per_worker,
        num_gpus=runtime.gpus_per_worker or None,
        runtime_env={"env_vars": worker_environment(runtime.gpus_per_worker)},
    )
    questions = _spread(run, num_questions)
    wanted = {"model": model_digest, "questions": settings_digest([question.id for question in questions])}
    return ray.get(task.remote(run, model_uri, questions, wanted, before))


def _spread(run: RunSettings, num_questions: int) -> list[Question]:
    """Questions with pictures, evenly from all that are asked."""
    index, cache = evaluate.open_index(run), evaluate.open_cache(run)
    sets = evaluate.load_question_sets(run)
    asked = [one for _, one in evaluate.find_questions(run, sets, index, cache)[0] if one.image_keys]
    count = min(num_questions, len(asked))
    return [asked[i * len(asked) // count] for i in range(count)]


def _measure_in_worker(
    run: RunSettings,
    model_uri: str,
    questions: list[Question],
    wanted: dict[str, str],
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    device = "cuda" if run.runtime.gpus_per_worker else "cpu"
    if device == "cpu":
        torch.set_num_threads(max(int(run.runtime.cpus_per_worker), 1))
    wanted = {**wanted, "hardware": describe_hardware(device)}
    if before is not None and {key: before.get(key) for key in wanted} == wanted:
        return before
    answerer = Answerer(model_uri, device=device, dtype=DTYPES[run.llm.dtype])
    return {**wanted, "measured": asdict(measure_answers(answerer, questions, evaluate.open_cache(run)))}
