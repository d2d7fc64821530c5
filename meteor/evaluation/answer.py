"""Greedy answers to batches of questions about images, from cached or live features."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from meteor.cache import CacheIdentity, FeatureCache
from meteor.data.collate import Batch, collate
from meteor.errors import NotFoundError
from meteor.evaluation.questions import Question
from meteor.features import FeatureSource
from meteor.model import MeteorForConditionalGeneration, MeteorProcessor
from meteor.model.positions import check_room
from meteor.model.trial import find_ways
from meteor.pretrained import download_folder, load_pretrained
from meteor.projector.answering import AS_TRAINED, AnswerSelection, set_selection
from meteor.text.tokens import tokenise


class Answerer:
    """A finished model that answers batches of questions.

    Args:
        model_uri: directory of a finished model, local or S3.
        device: "cpu" or "cuda".
        dtype: dtype of the weights.
    """

    def __init__(self, model_uri: str, *, device: str, dtype: torch.dtype) -> None:
        with local_copy(model_uri) as folder:
            self.model = load_pretrained(
                MeteorForConditionalGeneration,
                folder,
                setting="evaluate.model",
                example="the directory that finetune leaves",
                dtype=dtype,
            )
            self.model.to(device).eval()
            self.processor = MeteorProcessor.from_pretrained(folder)
        # Other programs may have written the folder without the settings that export writes.
        self.model.generation_config = self.processor.generation_config(self.model.generation_config)
        self.device = device
        self._answers_together = find_ways(self.model.config.text_config).answering is None

    def check(self, cache: FeatureCache) -> None:
        """Refuse features that the model was not trained on; `CacheMismatchError` names the field that differs."""
        cache.identity.require_match(CacheIdentity.from_dict(self.model.config.cache_identity))

    def choose(self, selection: AnswerSelection) -> None:
        """Set the weight of the experts, and check the number of tokens, which each batch tells the model.

        Raises:
            SettingsError: the projector does not have a setting of ``selection``, or cannot make its number of tokens.
        """
        self.processor.budget_at(selection.k)
        set_selection(self.model.projector, selection)

    def decode(self, tokens: torch.Tensor) -> list[str]:
        """Return answers (B, new tokens) as texts, without special tokens and surrounding white space."""
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def answer(
        self,
        questions: Sequence[Question],
        source: FeatureSource,
        *,
        max_new_tokens: int,
        selection: AnswerSelection = AS_TRAINED,
    ) -> list[str]:
        """Answer the questions greedily and return the texts in their order.

        Raises:
            TooLongError: a prompt and its answer need more positions than the language model has.
            SettingsError: the projector does not have a setting of ``selection``, or cannot make its number of tokens.
        """
        self.choose(selection)
        texts: list[str] = []
        # A model that padding disturbs gets its prompts one by one.
        size = len(questions) if self._answers_together else 1
        for start in range(0, len(questions), size):
            batch = self.batch(questions[start : start + size], source, selection=selection)
            longest_prompt = int((batch.attention_mask > 0).sum(dim=1).max())
            check_room(self.model.config.text_config, longest_prompt, max_new_tokens)
            texts += self.decode(self.generate(batch, max_new_tokens=max_new_tokens))
        return texts

    def batch(
        self,
        questions: Sequence[Question],
        source: FeatureSource,
        *,
        with_answers: bool = False,
        selection: AnswerSelection = AS_TRAINED,
    ) -> Batch:
        """Make the model's inputs for the questions, on its device.

        Args:
            questions: questions with their image keys.
            source: features of the images.
            with_answers: include the samples' last turns as labelled answers, to score given texts.
            selection: changes of the token selection; `answer` sets the weight of the experts in the projector as well.
        """
        processor = self.processor
        samples = []
        images = source.prefetch(key for question in questions for key in question.image_keys)
        for question in questions:
            tokens = tokenise(
                question.sample.conversation,
                processor.tokenizer,
                processor.template,
                for_generation=not with_answers,
                sample_id=question.id,
            )
            samples.append([(tokens, [next(images) for _ in question.image_keys])])
        return collate(
            samples,
            budget=processor.budget_at(selection.k),
            visual_tokens=processor.visual_tokens,
            pad_id=processor.tokenizer.pad_token_id,
            vision_width=self.model.config.vision_config.hidden_size,
            select_layer=self.model.config.select_layer,
            sub_images=selection.sub_images or processor.image_processor.sub_images,
            # Generation appends tokens on the right, so the padding must be on the left.
            padding_side="left",
        ).to(self.device)

    def generate(self, batch: Batch, *, max_new_tokens: int, min_new_tokens: int = 0, **kwargs: Any) -> torch.Tensor:
        """Generate the answers' tokens (B, new tokens) greedily; ``kwargs`` go to Hugging Face's ``generate``."""
        tokens = self.model.generate(
            **batch.as_inputs(),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            # Greedy decoding, so that an evaluation gives equal answers every time.
            do_sample=False,
            **kwargs,
        )
        return tokens[:, batch.input_ids.shape[1] :]


@contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """Yield a local directory as it is, or a copy of a remote directory that is deleted when the block ends."""
    if "://" not in uri:
        yield uri
        return
    with tempfile.TemporaryDirectory() as folder:
        if not download_folder(uri, folder):
            raise NotFoundError(f"there is no model at {uri}: give the directory that finetune leaves")
        yield folder
