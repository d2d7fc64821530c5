"""Questions -> answers, spread over actors of the cluster; those that are known are not asked."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy

from meteor import storage
from meteor.assembly import pixel_settings
from meteor.assembly.features import open_features, uris_by_key
from meteor.cache import DatasetIndex, FeatureCache
from meteor.config import RunSettings, settings_digest
from meteor.constants import GROUPING_TOKENS_PER_SUB_IMAGE
from meteor.evaluation.answer import Answerer
from meteor.evaluation.questions import Question
from meteor.features import FeatureSource
from meteor.planning.workers import answering_request
from meteor.train.build import DTYPES
from pipelines.ray_parts.answers import AnswerStore, prompt_digest
from pipelines.ray_parts.live_metrics import LiveMetrics
from pipelines.ray_parts.logs import configure_worker_logging
from pipelines.ray_parts.resources import wait_for_nodes
from pipelines.ray_parts.runtime import num_blocks, progress, worker_environment

_LOG = logging.getLogger(__name__)
# Changes when prompts are answered otherwise: older answers are not taken then.
_METHOD = 1
_CHARACTERS_A_TOKEN = 4


@dataclass(frozen=True)
class Asked:
    """A question of a set.

    Attributes:
        set: its name.
        reason: why one of its images is quarantined; "" where it can be asked.
        longest: tokens of the longest answer.
    """

    set: str
    question: Question
    reason: str
    longest: int


def answer(
    settings: RunSettings,
    asked: Sequence[Asked],
    model: tuple[str, str],
    cache: FeatureCache,
    index: DatasetIndex,
    live: LiveMetrics,
) -> tuple[dict[tuple[str, str], str], int]:
    """Answer what can be asked.

    Args:
        settings: of the run.
        asked: questions of all sets.
        model: URI and digest.
        cache, index: versions to read.
        live: counts answers as they come.

    Returns:
        Answers by (set, question id), those that are known taken as they are; and how many prompts were asked now.
    """
    store = AnswerStore(_answers_uri(settings, model[1], cache))
    good = [one for one in asked if not one.reason]
    prompts = {(one.set, one.question.id): prompt_digest(one.question, one.longest) for one in good}
    known = store.read()
    if num_known := sum(prompt in known for prompt in prompts.values()):
        _LOG.info("[%s] %d of %d questions were answered before", settings.name, num_known, len(prompts))
    # Each prompt once, also where two sets ask it.
    missing = {prompts[one.set, one.question.id]: (one.longest, one.question) for one in good}
    missing = {prompt: one for prompt, one in missing.items() if prompt not in known}
    if missing:
        try:
            for found in _ask(settings, missing, model[0], cache, index):
                store.add(found)
                live.answered(len(found))
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
    wait_for_nodes(answering_request(runtime), runtime, at_least=1)
    num_done = 0
    shared = ray.put([one for _, one in ordered])
    with progress(f"[{settings.name}] questions answered:", len(ordered), lambda: num_done):
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
            },
            batch_size=options.batch_size,
            batch_format="pyarrow",
            num_cpus=runtime.cpus_per_worker,
            num_gpus=runtime.gpus_per_worker or None,
            compute=ActorPoolStrategy(size=runtime.num_evaluators),
            runtime_env={"env_vars": worker_environment(runtime.gpus_per_worker)},
        )
        for row in dataset.iter_rows():
            num_done += 1
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
    ) -> None:
        configure_worker_logging(variant=settings.name, stage="evaluate")
        self._questions: list[tuple[int, Question]] = ray.get(questions)
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
        return pa.table({"position": positions, "prediction": answers})
