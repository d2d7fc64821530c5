"""Processor of a model: prompts and images become inputs, and generated tokens become text."""

import copy
import logging
import os
from typing import Any

import torch
from transformers import AutoProcessor, BatchFeature, GenerationConfig, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from meteor.constants import IMAGE_PLACEHOLDER
from meteor.data.collate import ImageLayout, VisualTokenBudget, expand_images, pad_tokens
from meteor.errors import SettingsError
from meteor.image.budget import visual_token_budget
from meteor.model.configuration import MeteorConfig
from meteor.model.image_processing import MeteorImageProcessor
from meteor.model.remote import AUTO_MAP
from meteor.text.jinja import chat_jinja
from meteor.text.rendered import tokenise_prompt
from meteor.text.template import end_token
from meteor.text.tokenizer import VisualTokens, find_visual_tokens
from meteor.text.tokens import TokenisedSample

_LOG = logging.getLogger(__name__)
_FILE = "processor_config.json"


class MeteorProcessor(ProcessorMixin):
    """Tokenizer, image processor and chat template of one model, with Hugging Face's conventions.

    Args:
        image_processor: slicing and normalisation.
        tokenizer: tokenizer of the language model, with the special token ``<image>``.
        projector: ``{"name": ..., **settings}``, from which the number of tokens per sub-image follows.
        template: prompt template of stage 2.
        text_sampler: whether the model has a text-guided sampler, which needs the numbers of turns and images.
        chat_template: Jinja text of `meteor.text.jinja.chat_jinja`; made from ``template`` if None.
        k: most visual tokens per sub-image; the largest number of training if None. ``processor.k = 64`` changes it for all
            calls, the argument ``k`` for one call. The model takes it from the inputs.
    """

    # transformers finds the parameters by their names, and overlooks those that can be given by name only.
    def __init__(
        self,
        image_processor: MeteorImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        projector: dict[str, Any] | None = None,
        template: str = "vicuna_v1",
        text_sampler: bool = False,
        chat_template: str | None = None,
        k: int | None = None,
    ) -> None:
        self.k = k
        self.projector, self.template, self.text_sampler = dict(projector or {"name": "meteor"}), template, text_sampler
        self.image_token = IMAGE_PLACEHOLDER
        self.image_token_id = find_visual_tokens(tokenizer).image_id
        self.auto_map = AUTO_MAP["processor"]
        super().__init__(image_processor, tokenizer, chat_template=chat_template or chat_jinja(template, tokenizer))

    @property
    def budget(self) -> VisualTokenBudget:
        """Patch grids -> number of the projector's tokens for each sub-image."""
        return self.budget_at(None)

    def budget_at(self, k: int | None) -> VisualTokenBudget:
        """Return the budget for ``k`` tokens per sub-image, or for the processor's own ``k`` if None.

        Raises:
            SettingsError: the projector cannot make this number of tokens.
        """
        settings = dict(self.projector)
        return visual_token_budget(settings.pop("name"), settings, k=self.k if k is None else k)

    @property
    def visual_tokens(self) -> VisualTokens:
        """Token ids of visual slots and separators."""
        return find_visual_tokens(self.tokenizer)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        numbers = ["turns", "image_numbers"] if self.text_sampler else []
        return ["input_ids", "attention_mask", *numbers, "pixel_values", "grids", "num_slots"]

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        audio: Any = None,
        *,
        k: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare the inputs of `MeteorForConditionalGeneration`.

        Args:
            images: an image, a list, or a list of lists; paths and URLs are loaded. Images of all prompts in order.
            text: a prompt or a list of prompts as ``apply_chat_template`` writes them, with ``<image>`` at each image. If no
                prompt has one, the images come first, with a warning.
            videos, audio: not supported.
            k: most visual tokens per sub-image; the processor's own ``k`` if None.
            kwargs: Hugging Face's ``padding`` (True), ``padding_side`` (the tokenizer's), ``truncation``, ``max_length``,
                ``add_special_tokens``, ``return_offsets_mapping`` and ``return_tensors``.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, L), with one ``<image>`` token per visual slot; with images
            ``pixel_values`` (N, F), see `meteor.model.image_processing.pack_pixels`, ``grids`` (S, 2) and ``num_slots`` (S,);
            ``turns`` and ``image_numbers`` (B, L) for a model with a text-guided sampler; ``offset_mapping`` (B, L, 2) if asked
            for, the character span of each token in its prompt, (0, 0) at visual tokens and padding.

        Raises:
            ValueError: the prompts have more or fewer ``<image>`` than there are images.
            BadImageError: the aspect ratio of an image is above the limit.
            SettingsError: the projector cannot make ``k`` tokens.
        """
        if videos is not None or audio is not None:
            raise ValueError("this model reads images and text, neither videos nor audio")
        if not isinstance(text, str | list | tuple | None) or (text and not isinstance(text[0], str)):
            raise ValueError(
                f"text must be a prompt or a list of prompts, and is {type(text).__name__}: images come first"
            )
        has_images = images is not None and not (isinstance(images, list | tuple) and not images)
        images, prompts, *_ = self.prepare_inputs_layout(images=images if has_images else None, text=text)
        if has_images and prompts is not None and not any(self.image_token in prompt for prompt in prompts):
            prompts = self._with_images_first(prompts, images)
        self.validate_inputs(images=images, text=prompts)
        options = self._merge_kwargs(self.valid_processor_kwargs, self.tokenizer.init_kwargs, **kwargs)["text_kwargs"]
        shown = self.image_processor(images) if has_images else None
        if prompts is None:
            return BatchFeature(dict(shown or {}), tensor_type=options.get("return_tensors"))
        layouts, budget = _layouts(shown), self.budget_at(k)
        rows, slots = [], []
        for prompt in prompts:
            sample = tokenise_prompt(
                prompt,
                self.tokenizer,
                self.template,
                add_begin=options.get("add_special_tokens", True),
                with_spans=bool(options.get("return_offsets_mapping")),
            )
            own, layouts = layouts[: prompt.count(self.image_token)], layouts[prompt.count(self.image_token) :]
            longer, counts = expand_images(sample, own, budget, self.visual_tokens)
            rows.append(_cut(longer, options, self.image_token_id))
            slots += counts
        data = self._padded(rows, options)
        if options.get("return_offsets_mapping"):
            data["offset_mapping"] = _offsets(rows, data["attention_mask"])
        if shown is not None:
            is_used = torch.tensor(slots) > 0
            is_shown = is_used.repeat_interleave(shown["grids"].prod(dim=1))
            data |= {
                "pixel_values": shown["pixel_values"][is_shown],
                "grids": shown["grids"][is_used],
                "num_slots": torch.tensor(slots)[is_used],
            }
        return BatchFeature(data, tensor_type=options.get("return_tensors"))

    def _with_images_first(self, prompts: list[str], images: Any) -> list[str]:
        """Put images before prompts that do not say where they belong."""
        listed = images if isinstance(images, list | tuple) else [images]
        groups = listed if isinstance(listed[0], list | tuple) else [listed]
        if len(groups) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts without {self.image_token} cannot share {len(groups)} lists of images: give a list of "
                f"images for each prompt, or write {self.image_token} at each image"
            )
        _LOG.warning(
            "no prompt has %s: its images are put first. apply_chat_template writes prompts as the model was trained on",
            self.image_token,
        )
        return [f"{self.image_token}\n" * len(group) + prompt for group, prompt in zip(groups, prompts, strict=True)]

    def _padded(self, rows: list[TokenisedSample], options: dict[str, Any]) -> dict[str, Any]:
        """Return token ids, mask and numbers as padded tensors, or as lists if padding is off and tensors are not asked for."""
        if options.get("padding") == "max_length":
            raise ValueError("this processor pads to the longest prompt: give padding=True")
        names = self.model_input_names[: 4 if self.text_sampler else 2]
        side = options.get("padding_side") or self.tokenizer.padding_side
        input_ids, mask, _, turns, numbers = pad_tokens([[row] for row in rows], self.tokenizer.pad_token_id, side)
        tensors = {"input_ids": input_ids, "attention_mask": mask, "turns": turns, "image_numbers": numbers}
        if options.get("return_tensors") is not None:
            if options.get("padding") is False and len({len(row.input_ids) for row in rows}) > 1:
                raise ValueError("the prompts differ in length, so that they make no tensor: give padding=True")
            return {name: tensors[name] for name in names}
        lists = {name: tensors[name].tolist() for name in names}
        if options.get("padding") is False:
            kept = tensors["attention_mask"].bool().tolist()
            lists = {
                name: [
                    [x for x, keep in zip(row, own, strict=True) if keep] for row, own in zip(values, kept, strict=True)
                ]
                for name, values in lists.items()
            }
        return lists

    def generation_config(self, own: GenerationConfig) -> GenerationConfig:
        """Return generation settings in which the end token that answers were taught comes first, before others."""
        config, tokenizer = copy.deepcopy(own), self.tokenizer
        learnt = tokenizer.convert_tokens_to_ids(end_token(self.template, tokenizer))
        known = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        ends = [learnt, *(end for end in known if end not in (None, learnt))]
        config.eos_token_id = ends if len(ends) > 1 else learnt
        config.pad_token_id = tokenizer.pad_token_id
        return config

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write the tokenizer's files, ``processor_config.json``, ``preprocessor_config.json`` and ``chat_template.jinja``."""
        self.tokenizer.chat_template = self.chat_template
        self.image_processor.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "MeteorProcessor":
        """Load from a local directory or a hub id.

        Raises:
            SettingsError: the directory has no processor_config.json.
        """
        path = str(pretrained_model_name_or_path)
        known = {
            name: kwargs[name] for name in ("revision", "cache_dir", "token", "local_files_only") if name in kwargs
        }
        if cached_file(path, _FILE, _raise_exceptions_for_missing_entries=False, **known) is None:
            raise SettingsError(f"{path!r} has no {_FILE}: not the directory of a finished model")
        return super().from_pretrained(path, *args, **kwargs)


def _offsets(rows: list[TokenisedSample], mask_BL: Any) -> list[list[tuple[int, int]]]:
    """Return the character spans of the tokens of padded rows."""
    spans = [iter(row.spans) for row in rows]
    return [[next(own) if kept else (0, 0) for kept in mask] for own, mask in zip(spans, mask_BL, strict=True)]


def _layouts(shown: BatchFeature | None) -> list[ImageLayout]:
    """Return the layout of each image."""
    if shown is None:
        return []
    grids, layouts, end = [tuple(grid) for grid in shown["grids"].tolist()], [], 0
    for count, slices in zip(shown["num_sub_images"].tolist(), shown["slice_grids"].tolist(), strict=True):
        layouts.append(ImageLayout(tuple(slices) if slices[0] else None, tuple(grids[end : end + count])))
        end += count
    return layouts


def _cut(sample: TokenisedSample, options: dict[str, Any], image_id: int) -> TokenisedSample:
    """Cut a prompt to ``max_length`` if truncation is on; images cannot be cut."""
    limit = options.get("max_length")
    if not options.get("truncation") or limit is None or len(sample.input_ids) <= limit:
        return sample
    if image_id in sample.input_ids[limit:]:
        raise ValueError(
            f"max_length={limit} would cut an image: the prompt has {len(sample.input_ids)} tokens. Give max_length=None, "
            "or fewer or smaller images"
        )
    return TokenisedSample(*(values[:limit] for values in vars(sample).values()))


AutoProcessor.register(MeteorConfig, MeteorProcessor)
