"""Processor of a model: questions and images become inputs, and generated tokens become text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerBase
from transformers.utils import cached_file

from meteor.constants import IMAGE_PLACEHOLDER
from meteor.data.collate import ImageLayout, expand_images, pad_tokens
from meteor.errors import ConversationError, SettingsError
from meteor.image.budget import visual_token_budget
from meteor.image.pixels import PixelSettings
from meteor.image.shown import as_shown
from meteor.image.transform import normalise, slice_image
from meteor.model.configuration import MeteorConfig
from meteor.text.conversation import Conversation, parse_turns
from meteor.text.tokens import Separators, TokenisedSample, load_tokenizer, tokenise, visual_separators

_FILE = "processor_config.json"


class MeteorProcessor:
    """Tokenizer, slicing and prompt of one model.

    Args:
        tokenizer: tokenizer of the language model.
        projector: ``{"name": ..., **settings}``, from which the number of tokens per sub-image follows.
        pixels: slicing parameters and size limits.
        mean, std: normalisation of the vision tower's input, per colour channel.
        template: prompt template of stage 2.
        separators: token ids after slices and rows of slices; looked up in the vocabulary if None.
        sub_images: ``global`` if stage 2 was trained on the global view alone.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        projector: dict[str, Any],
        pixels: PixelSettings,
        mean: Sequence[float],
        std: Sequence[float],
        template: str = "vicuna_v1",
        separators: Separators | None = None,
        sub_images: Literal["all", "global"] = "all",
    ) -> None:
        self.tokenizer, self.projector, self.pixels = tokenizer, dict(projector), pixels
        self.mean, self.std, self.template = tuple(mean), tuple(std), template
        self.separators = separators or visual_separators(tokenizer)
        self.sub_images = sub_images
        settings = dict(projector)
        self.budget = visual_token_budget(settings.pop("name"), settings)

    def __call__(
        self, text: str | Sequence[str], images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Prepare the inputs of `MeteorForConditionalGeneration.generate`.

        Args:
            text: a question or a list of questions. The ``<image>`` placeholders may be omitted, because images come first
                anyway.
            images: images of the question, or a list of images for each of several questions.

        Returns:
            ``input_ids``, ``attention_mask``, ``turns`` and ``image_numbers``, all (B, L), padded on the left;
            ``num_slots`` (S,); ``pixel_values``, S tensors (3, h, w).

        Raises:
            ConversationError: a question has placeholders, but not as many as images.
        """
        texts = [text] if isinstance(text, str) else list(text)
        groups: Any = [images] if isinstance(text, str) else images or [[] for _ in texts]
        samples: list[list[TokenisedSample]] = []
        num_slots: list[int] = []
        pixel_values: list[torch.Tensor] = []
        for question, group in zip(texts, groups, strict=True):
            shown = [as_shown(image) for image in group]
            layouts, sub_images = [], []
            for image in shown:
                plan = self.pixels.plan(image.width, image.height)
                layout = ImageLayout(plan.grid, plan.patch_grids)
                layouts.append(layout.only_global() if self.sub_images == "global" else layout)
                used = slice_image(image, plan)[: len(layouts[-1].patch_grids)]
                sub_images += used
            tokens = tokenise(
                self._conversation(question, len(group)), self.tokenizer, self.template, for_generation=True
            )
            longer, slots = expand_images(tokens, layouts, self.budget, self.separators)
            samples.append([longer])
            pixel_values += [
                normalise(pixels, self.mean, self.std) for pixels, count in zip(sub_images, slots, strict=True) if count
            ]
            num_slots += filter(None, slots)
        input_ids, attention_mask, _, turns, image_numbers = pad_tokens(samples, self.tokenizer.pad_token_id, "left")
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "turns": turns,
            "image_numbers": image_numbers,
            # Without images the model encodes a stand-in sub-image, which has no slots.
            "num_slots": torch.tensor(num_slots or [0]),
            "pixel_values": pixel_values,
        }

    def batch_decode(self, tokens: torch.Tensor) -> list[str]:
        """Return answers as text, without special tokens and surrounding white space."""
        return [answer.strip() for answer in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _conversation(self, question: str, num_images: int) -> Conversation:
        given = question.count(IMAGE_PLACEHOLDER)
        if given not in (0, num_images):
            raise ConversationError(
                f"the question has {given} {IMAGE_PLACEHOLDER} for {num_images} images: {question!r}"
            )
        placeholders = "" if given else f"{IMAGE_PLACEHOLDER}\n" * num_images
        turns = [{"from": "human", "value": placeholders + question}]
        return Conversation(
            parse_turns(turns, num_images=num_images, sample_id="question", for_generation=True), system=None
        )

    def save_pretrained(self, folder: str) -> None:
        """Write the tokenizer's files and ``processor_config.json``."""
        self.tokenizer.save_pretrained(folder)
        content = {
            "processor_class": type(self).__name__,
            "projector": self.projector,
            "pixels": vars(self.pixels),
            "mean": self.mean,
            "std": self.std,
            "template": self.template,
            "sub_images": self.sub_images,
            "separators": vars(self.separators),
        }
        (Path(folder) / _FILE).write_text(json.dumps(content, indent=2))

    @classmethod
    def from_pretrained(cls, path: str, **kwargs: Any) -> "MeteorProcessor":
        """Load from a local directory or a hub id."""
        file = cached_file(path, _FILE, _raise_exceptions_for_missing_entries=False)
        if file is None:
            raise SettingsError(f"{path!r} has no {_FILE}: not the directory of a finished model")
        content = json.loads(Path(file).read_text())
        content.pop("processor_class")
        pixels, separators = PixelSettings(**content.pop("pixels")), Separators(**content.pop("separators"))
        return cls(load_tokenizer(path), pixels=pixels, separators=separators, **content)


AutoProcessor.register(MeteorConfig, MeteorProcessor)
