"""Answers to questions from actors all over the cluster; known answers are reused."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from meteor.data.bulk import by_halves
from meteor.data.samples import SampleProblem
from meteor.errors import DataError, TooLongError
from meteor.evaluation.answer import Answerer
from meteor.evaluation.questions import Question
from meteor.features import FeatureSource
from meteor.planning.workers import answering_request
from meteor.projector.answering import AS_TRAINED, AnswerSelection
from meteor.train.build import DTYPES
from pipelines.ray_parts.answers import Answer, AnswerStore, prompt_digest
from pipelines.ray_parts.live_metrics import LiveMetrics
from pipelines.ray_parts.logs import configure_worker_logging
from pipelines.ray_parts.resources import wait_for_nodes
from pipelines.ray_parts.runtime import num_blocks, progress, worker_environment

_LOG = logging.getLogger(__name__)
# Version of the way in which prompts are answered: answers of other versions are not reused. 2: `focus` spends a budget.
_METHOD = 2
# Estimate for English text, good enough to sort prompts by length.
_CHARACTERS_PER_TOKEN = 4
# Largest number of tokens in the answer, and changes of the token selection.
Way = tuple[int, AnswerSelection]
_ANSWERS = pa.schema(
    [
        ("position", pa.int64()),
        ("prediction", pa.string()),
        ("global_only", pa.bool_()),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class SetQuestion:
    """A question of a question set.

    Attributes:
        set: name of the question set.
        question: the question, with the keys of its images.
        reason: reason for which an image of the question is quarantined, or the question got no answer; "" for all others.
        longest: largest number of tokens in the answer.
        selection: changes of the token selection when answering.
    """

    set: str
    question: Question
    reason: str
    longest: int
    selection: AnswerSelection = AS_TRAINED

    @property
    def way(self) -> Way:
        return self.longest, self.selection


@dataclass(frozen=True)
class Answers:
    """Answers to the questions of all sets.

    Attributes:
        questions: questions of all sets in order, with the reasons of those that got no answer.
        answers: (set, question id) -> answer, known answers included.
        num_new: number of prompts that were asked now.
        unanswered: (set, question id) -> reason, for prompts that were asked in vain; the next start asks them again.
    """

    questions: list[SetQuestion]
    answers: dict[tuple[str, str], Answer]
    num_new: int
    unanswered: dict[tuple[str, str], str]

    def problems(self, name: str) -> list[SampleProblem]:
        """Return the questions of a set that were asked in vain."""
        return [
            SampleProblem(question_id, "unanswered", reason)
            for (set_name, question_id), reason in self.unanswered.items()
            if set_name == name
        ]


@dataclass(frozen=True)
class Unanswered:
    """Reason for which a prompt has no answer: its text does not fit the template, or an image has gone or changed."""

    reason: str


def answer(
    settings: RunSettings,
    questions: Sequence[SetQuestion],
    model: tuple[str, str],
    cache: FeatureCache,
    index: DatasetIndex,
    live: LiveMetrics,
    check_claim: Callable[[], None],
) -> Answers:
    """Answer all questions whose images can be used.

    Args:
        settings: settings of the run.
        questions: questions of all sets.
        model: URI and digest of the model.
        cache, index: feature cache and dataset index, at the versions to read.
        live: metrics that count answers as they arrive.
        check_claim: function that raises an error if a newer start of the stage has taken over.
    """
    store = AnswerStore(_answers_uri(settings, model[1], cache))
    good = [each for each in questions if not each.reason]
    prompts = {(each.set, each.question.id): prompt_digest(each.question, *each.way) for each in good}
    cuts = settings.evaluate.long_prompts == "global"
    # Another run may have cut prompts that count as wrong here.
    known: dict[str, Answer | Unanswered] = {
        prompt: answer for prompt, answer in store.read().items() if cuts or not answer.global_only
    }
    if num_known := sum(prompt in known for prompt in prompts.values()):
        _LOG.info("[%s] %d of %d questions were answered before", settings.name, num_known, len(prompts))
    # A prompt that occurs in two sets is answered once.
    missing = {prompts[each.set, each.question.id]: (each.way, each.question) for each in good}
    missing = {prompt: question for prompt, question in missing.items() if prompt not in known}
    if missing:
        try:
            for answers in _ask(settings, missing, model[0], cache, index):
                if store.add({prompt: text for prompt, text in answers.items() if isinstance(text, Answer)}):
                    check_claim()
                live.answered(len(answers))
                known |= answers
        finally:
            store.flush()
    found = {key: known[prompt] for key, prompt in prompts.items()}
    reasons = {key: answer.reason for key, answer in found.items() if isinstance(answer, Unanswered)}
    return Answers(
        [replace(each, reason=reasons.get((each.set, each.question.id), each.reason)) for each in questions],
        {key: answer for key, answer in found.items() if isinstance(answer, Answer)},
        len(missing),
        reasons,
    )


def _answers_uri(settings: RunSettings, model_digest: str, cache: FeatureCache) -> str:
    """Return the folder of answers, named by everything that they depend on: model, type and features, but not batches."""
    content = [_METHOD, model_digest, settings.llm.dtype, settings.evaluate.features, cache.identity.key, cache.codec]
    return storage.join(settings.output, "answers", settings_digest(content)[:16])


def _ask(
    settings: RunSettings,
    missing: Mapping[str, tuple[Way, Question]],
    model_uri: str,
    cache: FeatureCache,
    index: DatasetIndex,
) -> Iterator[dict[str, Answer | Unanswered]]:
    """Yield prompt -> answer, or why there is none, as answers arrive from actors.

    Questions of similar length share a batch. The longest come first, so that no actor still works on them at the end.
    """
    runtime, options = settings.runtime, settings.evaluate
    lengths = _lengths(settings, missing, index)
    ordered = sorted(missing.items(), key=lambda item: (_sorted_last(item[1][0]), lengths[item[0]]), reverse=True)
    wait_for_nodes(answering_request(runtime), runtime, at_least=1)
    num_done = 0
    shared = ray.put([question for _, question in ordered])
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
        for found in _by_prompt(dataset.iter_rows(), [prompt for prompt, _ in ordered]):
            num_done += 1
            yield found


def _by_prompt(rows: Iterable[Mapping[str, Any]], prompts: Sequence[str]) -> Iterator[dict[str, Answer | Unanswered]]:
    for row in rows:
        answer = Answer(row["prediction"], row["global_only"]) if row["reason"] is None else Unanswered(row["reason"])
        yield {prompts[row["position"]]: answer}


def _lengths(settings: RunSettings, missing: Mapping[str, tuple[Way, Question]], index: DatasetIndex) -> dict[str, int]:
    """Return prompt -> number of tokens, estimated; to make batches it need not be exact."""
    pixels = pixel_settings(settings)
    shown = {key for _, question in missing.values() for key in question.image_keys}
    sizes = {row.image_key: (row.width, row.height) for row in index.rows() if row.image_key in shown}
    num_sub_images = {key: len(pixels.plan(*size).patch_grids) for key, size in sizes.items()}
    return {
        prompt: GROUPING_TOKENS_PER_SUB_IMAGE * sum(num_sub_images[key] for key in question.image_keys)
        + sum(len(turn.text) for turn in question.sample.turns) // _CHARACTERS_PER_TOKEN
        for prompt, (_, question) in missing.items()
    }


class AnswerActor:
    """Actor with a model and a feature source; it answers batches of questions, given by position."""

    def __init__(
        self,
        settings: RunSettings,
        model_uri: str,
        cache: tuple[str, int],
        image_uris: dict[str, str],
        questions: Any,
    ) -> None:
        configure_worker_logging(run=settings.name, stage="evaluate")
        self._cuts = settings.evaluate.long_prompts == "global"
        self._questions: list[tuple[Way, Question]] = ray.get(questions)
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
        answers: list[Answer | Unanswered] = []
        # Questions are sorted by the way in which they are answered, so that nearly all batches are one group.
        for way, group in groupby((self._questions[i] for i in positions), key=lambda item: item[0]):
            questions = [question for _, question in group]
            ask, give_up = partial(self._ask, way=way), partial(self._answer_differently, way=way)
            for part in by_halves(ask, questions, give_up, concerns_items=_is_about_questions):
                answers += part
        rows = [
            {"position": position, "prediction": answer.text, "global_only": answer.global_only}
            if isinstance(answer, Answer)
            else {"position": position, "reason": answer.reason}
            for position, answer in zip(positions, answers, strict=True)
        ]
        return pa.Table.from_pylist(rows, _ANSWERS)

    def _ask(self, questions: Sequence[Question], way: Way, *, global_only: bool = False) -> list[Answer | Unanswered]:
        texts = self._answerer.answer(questions, self._source, max_new_tokens=way[0], selection=way[1])
        return [Answer(text, global_only) for text in texts]

    def _answer_differently(
        self, question: Sequence[Question], error: BaseException, way: Way
    ) -> list[Answer | Unanswered]:
        """Answer a question whose prompt is too long from its images' global views, or say why it has no answer."""
        if isinstance(error, TooLongError) and self._cuts and way[1].sub_images != "global":
            try:
                return self._ask(question, (way[0], replace(way[1], sub_images="global")), global_only=True)
            except DataError as second:
                error = second
        return [Unanswered(str(error))]


def _sorted_last(way: Way) -> tuple[int, str]:
    return way[0], repr(way[1])


def _is_about_questions(error: BaseException) -> bool:
    # An outage of the store, or a device without memory, would make the score depend on the machine.
    return isinstance(error, DataError)
