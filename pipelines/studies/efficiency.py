"""Measurement of how fast each variant of a study answers: one after the other, on the same hardware and questions."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import ray
import torch

from meteor.assembly import Inputs, pixel_settings
from meteor.assembly.features import uris_by_key
from meteor.assembly.study import study_uri
from meteor.assembly.training_stage import find_model
from meteor.cache import FeatureCache
from meteor.checksums import read_checked_json, write_checked_json
from meteor.config import RunSettings, Variant, settings_digest
from meteor.errors import NotFoundError, SettingsError
from meteor.evaluation.answer import Answerer
from meteor.evaluation.efficiency import describe_hardware, measure_answers
from meteor.evaluation.questions import Question
from meteor.image.files import read_image_file
from meteor.image.pixels import slice_bytes
from meteor.train.build import DTYPES
from pipelines import evaluate
from pipelines.ray_parts.runtime import worker_environment

_LOG = logging.getLogger(__name__)
# Version of the measurement: results of other versions are measured again.
_METHOD = 4


def measure_variants(inputs: Inputs, variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    """Measure the first seed of each variant, if it has a finished model.

    A measurement with the same hardware, model, token selection and questions is not repeated. The selection is that of
    ``evaluate``, without ``evaluate.sets``.

    Returns:
        Variant -> fields of `meteor.evaluation.efficiency.Efficiency`.
    """
    settings, study = inputs.settings, inputs.settings.study
    if study is None or not study.measure_questions or not settings.data.evaluate:
        return {}
    first = {variant.name: variant for variant in reversed(variants)}
    hardware = _describe_hardware(variants[0].settings)
    measured = {}
    for name in dict.fromkeys(variant.name for variant in variants):
        run = inputs.of(first[name].settings)
        try:
            model_uri, digest = find_model(run)
        except SettingsError:
            continue
        uri, questions = (
            study_uri(settings, "efficiency", f"{name}.json"),
            _spread(run, study.measure_questions),
        )
        measured_on = {
            "model": settings_digest([_METHOD, digest, vars(evaluate.shared_selection(run.settings))]),
            "questions": settings_digest([question.id for question in questions]),
            "hardware": hardware,
        }
        content = _read(uri)
        if content is None or {key: content.get(key) for key in measured_on} != measured_on:
            content = {**measured_on, "measured": _measure(run, model_uri, questions)}
            write_checked_json(uri, content)
            _LOG.info("[%s] answers: %s", name, _line(content["measured"]))
        measured[name] = content["measured"]
    return measured


def _line(measured: dict[str, Any]) -> str:
    return (
        f"prompt of {measured['num_prompt_tokens']:.0f} tokens in {measured['prefill_s'] * 1000:.3g} ms, then "
        f"{measured['tokens_per_s']:.3g} tokens/s, {measured['memory_bytes'] / 1e9:.3g} GB"
    )


def _read(uri: str) -> dict[str, Any] | None:
    try:
        return read_checked_json(uri)
    except NotFoundError:
        return None


def _describe_hardware(run: RunSettings) -> str:
    return ray.get(_task(run, _hardware_of_worker).remote(run))


def _measure(inputs: Inputs, model_uri: str, questions: list[Question]) -> dict[str, Any]:
    run, cache = inputs.settings, inputs.cache()
    keys = {key for question in questions for key in question.image_keys}
    uris = {key: uri for key, uri in uris_by_key(inputs.index().rows()).items() if key in keys}
    arguments = (run, model_uri, questions, (cache.uri, cache.version), uris)
    return ray.get(_task(run, _measure_in_worker).remote(*arguments))


def _task(run: RunSettings, function: Callable[..., Any]) -> Any:
    """Make a Ray task with a new process per call, as the peak of memory counts from a process's start."""
    runtime = run.runtime
    return ray.remote(max_calls=1)(function).options(
        num_cpus=runtime.cpus_per_worker,
        num_gpus=runtime.gpus_per_worker or None,
        runtime_env={"env_vars": worker_environment(runtime.gpus_per_worker)},
    )


def _spread(inputs: Inputs, num_questions: int) -> list[Question]:
    """Choose questions with images, evenly from all questions that can be answered."""
    sets = evaluate.load_question_sets(inputs)
    found = evaluate.find_questions(inputs.settings, sets, inputs.index(), inputs.cache())
    questions = [each.question for each in found if not each.reason and each.question.image_keys]
    count = min(num_questions, len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def _device(run: RunSettings) -> str:
    if run.runtime.gpus_per_worker:
        return "cuda"
    torch.set_num_threads(max(int(run.runtime.cpus_per_worker), 1))
    return "cpu"


def _hardware_of_worker(run: RunSettings) -> str:
    return describe_hardware(_device(run))


def _measure_in_worker(
    run: RunSettings, model_uri: str, questions: list[Question], cache: tuple[str, int], uris: dict[str, str]
) -> dict[str, Any]:
    answerer = Answerer(model_uri, device=_device(run), dtype=DTYPES[run.llm.dtype])
    pixels, source = pixel_settings(run), FeatureCache.open(cache[0], version=cache[1])
    images = {key: slice_bytes(read_image_file(uri), key, pixels) for key, uri in uris.items()}
    return asdict(measure_answers(answerer, questions, source, images, selection=evaluate.shared_selection(run)))
