"""Adapter for lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), which gives tasks and prompts and scores answers.

lmms-eval finds `manifest` by the entry-point group ``lmms_eval.models`` and imports this file. Nothing in this library
imports it, because lmms-eval is an optional package.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm

from meteor.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER
from meteor.data.bulk import by_halves
from meteor.data.samples import Sample
from meteor.errors import DataError, SettingsError
from meteor.evaluation.answer import Answerer
from meteor.evaluation.questions import Question
from meteor.evaluation.shown import ShownImages
from meteor.projector.answering import AS_TRAINED
from meteor.text.conversation import Turn

_LOG = logging.getLogger(__name__)
_MAX_NEW_TOKENS = 128
_ONLY_IMAGES = "llava_meteor reads images only: leave tasks with videos or sound out"


def manifest() -> ModelManifest:
    """Return the entry under which lmms-eval registers the model ``llava_meteor``."""
    return ModelManifest(
        "llava_meteor", simple_class_path=f"{__name__}.LlavaMeteor", chat_class_path=f"{__name__}.LlavaMeteorChat"
    )


class LlavaMeteor(lmms):
    """A finished model in lmms-eval's "simple" form; several processes (`accelerate launch`) share the questions.

    Args:
        pretrained: directory that finetune leaves, local or s3://.
        batch_size: questions per batch.
        device: device of the model; by default "cuda" if there is a GPU.
        dtype: dtype of the weights; by default bfloat16 on a GPU and float32 elsewhere.
        k: most visual tokens per sub-image; by default the largest number of training.
    """

    # Position of the generation settings in a request's arguments.
    _options_at = 1

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "",
        k: int | str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if wrong := sorted(name for name, value in unknown.items() if name != "max_batch_size" and value is not None):
            raise SettingsError(f"llava_meteor does not know {', '.join(wrong)}: give pretrained, device, dtype, k")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        chosen = str(self.accelerator.device) if device is None or self._world_size > 1 else str(device)
        kind = torch.device(chosen).type
        self._answerer = Answerer(
            pretrained, device=chosen, dtype=getattr(torch, dtype or ("bfloat16" if kind == "cuda" else "float32"))
        )
        self._answerer.processor.k = None if k is None else int(k)
        self._answerer.choose(AS_TRAINED)
        self._batch_size, self.device = int(batch_size), torch.device(chosen)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer the requests greedily; each answer is cut at the first of its task's stop texts."""
        # Batches share a longest answer, and prompts of similar length come together; the longest first, so that memory
        # runs out at the start or not at all.
        answers = [""] * len(requests)
        longest = [int(self._options(request).get("max_new_tokens") or _MAX_NEW_TOKENS) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (longest[i], len(requests[i].args[0])), reverse=True)
        bar = tqdm(total=len(requests), desc="llava_meteor", disable=self._rank != 0)
        for batch in _batches(order, self._batch_size, longest.__getitem__):
            shown = ShownImages(self._answerer.model, self._answerer.processor)
            questions = [self._asked(i, requests[i], shown) for i in batch]
            texts = self._answer(questions, shown, longest[batch[0]])
            for i, text in zip(batch, texts, strict=True):
                context, options = requests[i].args[0], self._options(requests[i])
                answers[i] = _cut(text, options.get("until") or [])
                self.cache_hook.add_partial("generate_until", (context, options), answers[i])
            bar.update(len(batch))
        bar.close()
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Score given continuations.

        Returns:
            The sum of the log-probabilities of each continuation's tokens with the end token, and whether greedy decoding
            would give these tokens.
        """
        results = []
        for i, request in enumerate(tqdm(requests, desc="llava_meteor", disable=self._rank != 0)):
            shown = ShownImages(self._answerer.model, self._answerer.processor)
            question = self._question(i, request, shown)
            target = request.args[1]
            continuation = target if isinstance(target, str) else target(self._document(request))
            turns = (*question.sample.turns, Turn("gpt", continuation.strip()))
            question = replace(question, sample=replace(question.sample, turns=turns))
            batch = self._answerer.batch([question], shown, with_answers=True)
            inputs = {name: value for name, value in batch.as_inputs().items() if name != "labels"}
            with torch.inference_mode():
                log_LV = self._answerer.model(**inputs).logits[0, :-1].float().log_softmax(-1)
            # The logits at a position predict the following token.
            wanted_L = batch.labels[0, 1:]
            places = (wanted_L != IGNORE_INDEX).nonzero().squeeze(-1)
            wanted_T, log_TV = wanted_L[places], log_LV[places]
            chosen_T = log_TV.gather(-1, wanted_T[:, None]).squeeze(-1)
            results.append((float(chosen_T.sum()), bool((log_TV.argmax(-1) == wanted_T).all())))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise SettingsError("llava_meteor answers tasks of one round: leave multi-round tasks out")

    def _document(self, request: Any) -> Any:
        *_, doc_id, task, split = request.args
        return self.task_dict[task][split][doc_id]

    def _answer(self, questions: Sequence[Question], shown: ShownImages, longest: int) -> list[str]:
        """Answer a batch; a prompt beyond the model's positions has the answer "", and a line says why."""

        def ask(some: Sequence[Question]) -> list[str]:
            return self._answerer.answer(some, shown, max_new_tokens=longest)

        def leave_out(some: Sequence[Question], error: BaseException) -> list[str]:
            _LOG.warning("%s has no answer: %s", some[0].id, error)
            return [""]

        parts = by_halves(ask, questions, leave_out, concerns_items=lambda error: isinstance(error, DataError))
        return [text for part in parts for text in part]

    def _options(self, request: Any) -> dict[str, Any]:
        return request.args[self._options_at]

    def _asked(self, number: int, request: Any, shown: ShownImages) -> Question:
        """Make the question of a request for an answer."""
        return self._question(number, request, shown)

    def _question(self, number: int, request: Any, shown: ShownImages) -> Question:
        """Make a question with its images first, as in training; placeholders in the task's text are removed."""
        context, doc_to_visual = request.args[0], request.args[2]
        visuals = (doc_to_visual(self._document(request)) or []) if doc_to_visual is not None else []
        # Some tasks nest their images in lists.
        images = [image for visual in visuals for image in (visual if isinstance(visual, list | tuple) else [visual])]
        turns = (Turn("human", context.replace(IMAGE_PLACEHOLDER, "").strip(), len(images)),)
        return _show(number, turns, images, shown)


class LlavaMeteorChat(LlavaMeteor):
    """A finished model in lmms-eval's "chat" form, which lmms-eval prefers: tasks give messages, with examples and systems."""

    is_simple = False
    _options_at = 2

    def _asked(self, number: int, request: Any, shown: ShownImages) -> Question:
        """Make a question from a task's messages; the images of a message come before its words, as in training."""
        messages = ChatMessages(messages=request.args[1](self._document(request))).messages
        system = None
        if messages[0].role == "system":
            system, messages = "".join(_words(messages[0])), messages[1:]
        turns, images = [], []
        for message in messages:
            shown_here = [part.url for part in message.content if part.type == "image"]
            if any(part.type not in ("text", "image") for part in message.content):
                raise SettingsError(_ONLY_IMAGES)
            words = "".join(_words(message)).replace(IMAGE_PLACEHOLDER, "").strip()
            turns.append(Turn("gpt" if message.role == "assistant" else "human", words, len(shown_here)))
            images += shown_here
        return _show(number, tuple(turns), images, shown, system)


def _words(message: Any) -> list[str]:
    return [part.text for part in message.content if part.type == "text"]


def _show(
    number: int, turns: tuple[Turn, ...], images: Sequence[Any], shown: ShownImages, system: str | None = None
) -> Question:
    """Make a question, and encode its images."""
    if not all(isinstance(image, Image.Image) for image in images):
        raise SettingsError(_ONLY_IMAGES)
    keys = tuple(f"{number}/{i}" for i in range(len(images)))
    for key, image in zip(keys, images, strict=True):
        shown.add(key, image)
    return Question(str(number), Sample(str(number), keys, turns, system=system), image_keys=keys)


def _batches(order: Sequence[int], size: int, key: Any) -> Iterable[list[int]]:
    """Yield batches of up to ``size`` neighbours with equal ``key``."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == size or key(batch[0]) != key(i)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _cut(text: str, until: str | Sequence[str]) -> str:
    for stop in [until] if isinstance(until, str) else until:
        if stop:
            text = text.split(stop)[0]
    return text.strip()
