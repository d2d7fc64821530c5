"""A dialogue with a model about images: questions, and answers that appear word by word."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer

from meteor.data.samples import Sample
from meteor.errors import ConversationError
from meteor.evaluation.answer import Answerer
from meteor.evaluation.efficiency import TokenTimes
from meteor.evaluation.questions import Question
from meteor.evaluation.shown import ShownImages
from meteor.features import ImageFeatures
from meteor.image.decode import decode_image
from meteor.image.files import read_image_file
from meteor.projector.answering import AS_TRAINED, AnswerSelection
from meteor.text.conversation import Turn


@dataclass(frozen=True, eq=False)
class ShownImage:
    """An image of the dialogue.

    Attributes:
        uri: URI of the file.
        image: the decoded image, turned as a viewer shows it.
        features: output of the frozen encoder.
    """

    uri: str
    image: Image.Image
    features: ImageFeatures


@dataclass(frozen=True)
class Reply:
    """An answer and its cost.

    Attributes:
        text: the answer.
        num_prompt_tokens: tokens of the prompt, including visual tokens.
        num_tokens: tokens of the answer.
        first_token_s: seconds from the question to the first token.
        tokens_per_s: speed after the first token; None if the answer has a single token.
    """

    text: str
    num_prompt_tokens: int
    num_tokens: int
    first_token_s: float
    tokens_per_s: float | None


class Dialogue:
    """The turns of a dialogue so far with their images, each of which is encoded once.

    Args:
        answerer: a finished model with its vision tower.
        selection: changes of the token selection.

    Raises:
        SettingsError: the projector does not have a setting of ``selection``, or cannot make its number of tokens.
    """

    def __init__(self, answerer: Answerer, selection: AnswerSelection = AS_TRAINED) -> None:
        self.answerer, self.selection = answerer, selection
        answerer.choose(selection)
        self._shown = ShownImages(answerer.model, answerer.processor)
        self.turns: list[Turn] = []
        self.images: list[ShownImage] = []
        # Images that belong to earlier questions.
        self._num_discussed = 0

    def show(self, uri: str) -> ShownImage:
        """Read and encode an image, which then belongs to the next question.

        Raises:
            NotFoundError: the file does not exist.
            BadImageError: the file is not an image, or the model cannot use the image.
        """
        data = read_image_file(uri)
        image = decode_image(data, max_pixels=self.answerer.processor.image_processor.pixels.max_pixels)
        shown = ShownImage(uri, image, self._shown.add(hashlib.sha256(data).hexdigest(), image))
        self.images.append(shown)
        return shown

    def ask(self, text: str, *, max_new_tokens: int, on_text: Callable[[str], None] = lambda piece: None) -> Reply:
        """Answer the next question greedily, given all earlier turns and images.

        Args:
            text: the question.
            max_new_tokens: most tokens of the answer.
            on_text: called with each piece of the answer as it comes; the pieces together are the answer.

        Raises:
            ConversationError: the question is empty.
        """
        if not text.strip():
            raise ConversationError("the question is empty: write a text")
        turns = [*self.turns, Turn("human", text.strip(), len(self.images) - self._num_discussed)]
        keys = tuple(shown.features.image_key for shown in self.images)
        sample = Sample("dialogue", tuple(shown.uri for shown in self.images), tuple(turns))
        started = time.perf_counter()
        batch = self.answerer.batch(
            [Question("dialogue", sample, image_keys=keys)], self._shown, selection=self.selection
        )
        streamer = _Streamer(self.answerer.processor.tokenizer, on_text)
        tokens = self.answerer.generate(batch, max_new_tokens=max_new_tokens, streamer=streamer)
        [answer] = self.answerer.decode(tokens)
        self.turns = [*turns, Turn("gpt", answer)]
        self._num_discussed = len(self.images)
        first_s, last_s, count = streamer.times.seconds[0], streamer.times.seconds[-1], len(streamer.times.seconds)
        rate = (count - 1) / (last_s - first_s) if count > 1 else None
        return Reply(answer, batch.input_ids.shape[1], count, first_s - started, rate)


class _Streamer(TextStreamer):
    """Streamer of transformers that gives text as soon as it is final, and records the time of each token."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self.times = TokenTimes()

    def put(self, value: torch.Tensor) -> None:
        self.times.put(value)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)
