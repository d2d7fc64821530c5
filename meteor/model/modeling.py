"""The model: features of sub-images -> projector -> visual tokens in the prompt -> language model.

Letters: B samples, L sequence, S sub-images of all samples, P patches, C vision width, K tokens per sub-image, D LLM width.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import modeling_auto

from meteor.checksums import check_folder
from meteor.constants import IGNORE_INDEX
from meteor.data.collate import empty_sub_image, pad_sub_images
from meteor.errors import DataError, SettingsError
from meteor.model.answers import AnswerHead, use_answer_head
from meteor.model.attention import VARLEN, Layout
from meteor.model.configuration import MeteorConfig
from meteor.model.headless import MeteorModel
from meteor.model.image_processing import unpack_pixels
from meteor.model.language_model import accept_embeddings, set_supported_attention
from meteor.model.positions import check_room
from meteor.model.rows import Arranged, arrange, close_gaps, restore_prompts
from meteor.model.text_sampler import TextSampler, TokenGroups
from meteor.model_files import require_config
from meteor.projector import Projector, ProjectorOutput, build_projector
from meteor.projector.statistics import sum_selection
from meteor.vision.encoder import FrozenEncoder
from meteor.vision.towers import build_tower

_LOG = logging.getLogger(__name__)


@dataclass
class MeteorOutput(CausalLMOutputWithPast):
    """Output of a forward pass with labels.

    Attributes:
        loss: training loss, 0-d float32.
        logits: (B, L, vocabulary), or None if the forward pass skipped them.
        selection_sums: sums of `meteor.projector.statistics` over the sub-images with visual slots,
            (`meteor.projector.statistics.NUM_SUMS`,) float32, without gradient; None for projectors without both experts'
            scores.
    """

    selection_sums: torch.Tensor | None = None


class MeteorForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """LLaVA-Meteor: a language model that reads projected vision features.

    Training uses cached features and omits the vision tower (``vision_tower=False``). A finished model contains the tower
    that made its cache, so that it can encode images itself.
    """

    config_class = MeteorConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"^vision_tower\."]  # noqa: RUF012

    def __init__(self, config: MeteorConfig, *, vision_tower: bool = True, language_model: nn.Module | None = None):
        super().__init__(config)
        self.vision_tower = build_tower(config.vision_config) if vision_tower else None
        self.projector: Projector = build_projector(
            **config.projector,
            vision_width=config.vision_config.hidden_size,
            llm_width=config.text_config.hidden_size,
        )
        self.language_model: Any = (
            language_model
            if language_model is not None
            else AutoModelForCausalLM.from_config(config.text_config, attn_implementation="eager")
        )
        accept_embeddings(self.language_model)
        use_answer_head(self.language_model)
        parts: list[Any] = [part for part in (self.language_model, self.vision_tower) if part is not None]
        # Layers that accelerate must not divide between devices are those of the parts, whatever their architecture.
        self._no_split_modules = sorted({name for part in parts for name in part._no_split_modules or ()})
        self.text_sampler = TextSampler(self.language_model, **config.text_sampler) if config.text_sampler else None
        # transformers passes its choice of attention to a model's own layers only, and clears it in the configs of parts.
        for part in parts:
            set_supported_attention(part, self.config._attn_implementation)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, after the files of a local folder were compared with ``checksums.json``.

        Raises:
            NotFoundError: the local folder has no config.json.
            DamagedError: a file is missing or is not what was written.
        """
        folder = str(pretrained_model_name_or_path)
        require_config(folder)
        if os.path.isdir(folder):
            check_folder(folder)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, because every part initialises itself; transformers' default would overwrite the scan's weights."""

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.language_model.base_model

    @property
    def model(self) -> MeteorModel:
        """The model without its output layer."""
        return MeteorModel(self)

    @property
    def base_model(self) -> MeteorModel:
        """`model`, by the name that trainers use."""
        return self.model

    def grow_vocabulary(self, tokenizer_size: int) -> None:
        """Give every token of the tokenizer a row in the embedding, whose number of rows becomes a multiple of 64.

        New rows are the mean of the others, in the output layer too: a mean of logits is never the largest, so greedy answers
        do not change. If all tokens have rows, nothing changes.
        """
        embedding: Any = self.get_input_embeddings()
        num_rows = embedding.weight.shape[0]
        if tokenizer_size <= num_rows:
            return
        self.language_model.resize_token_embeddings(tokenizer_size, pad_to_multiple_of=64, mean_resizing=False)
        with torch.no_grad():
            layers = (self.get_input_embeddings(), self.get_output_embeddings())
            for weight in (getattr(layer, name, None) for layer in layers for name in ("weight", "bias")):
                if weight is not None:
                    weight[num_rows:] = weight[:num_rows].float().mean(dim=0).to(weight.dtype)
        use_answer_head(self.language_model)
        self.config.text_config = self.language_model.config

    def frozen_encoder(self) -> FrozenEncoder:
        """Return the vision tower as an encoder.

        Raises:
            DataError: the model was loaded without its vision tower.
        """
        if self.vision_tower is None:
            raise DataError("this model was built without its vision tower; load it with vision_tower=True")
        select_layer, identity = self.config.select_layer, self.config.cache_identity or {}
        # The cache's digest is taken over: hashing the weights takes about 1 s, and these weights may have been cast.
        known: dict[str, Any] = {"digest": identity.get("encoder_digest"), "importance": identity.get("importance")}
        known |= {name: identity["preprocessing"][name] for name in ("mean", "std") if identity}
        return FrozenEncoder(self.vision_tower, select_layer=select_layer, attention_layers=(select_layer,), **known)

    def encode(
        self, pixel_values: torch.Tensor | None = None, grids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode normalised sub-images.

        Args:
            pixel_values: patches of the sub-images, (N, F), see `meteor.model.image_processing.pack_pixels`; None for a
                stand-in without visual slots.
            grids: rows and columns of patches of each sub-image, (S, 2).

        Returns:
            Features (S, P, C), importance rows (S, P) and grids (S, 2).
        """
        encoder, images = self.frozen_encoder(), []
        if pixel_values is not None:
            if grids is None:
                raise DataError("pixel_values needs grids: give both as the processor makes them")
            images = unpack_pixels(pixel_values, grids.tolist(), encoder.patch_size)
        encoded = [(image.features, image.cls_attention[0], image.grid) for image in encoder.encode(images)]
        if not encoded:
            encoded = [empty_sub_image(encoder.width)]
        features_SPC, cls_attention_SP = pad_sub_images(encoded)
        grids_S2 = torch.tensor([grid for _, _, grid in encoded])
        return features_SPC.to(self.device), cls_attention_SP.to(self.device), grids_S2.to(self.device)

    def get_image_features(
        self, pixel_values: torch.Tensor, grids: torch.Tensor, num_slots: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the visual tokens of all sub-images in order, (number of visual tokens, D).

        Args:
            pixel_values, grids: see `encode`.
            num_slots: number of visual tokens of each sub-image, (S,); all tokens of the projector if None.
        """
        projected = self.project(*self.encode(pixel_values, grids), num_slots=num_slots)
        slots_SK = projected.mask if num_slots is None else _first_slots(num_slots, projected.tokens.shape[1])
        return projected.tokens[slots_SK.to(projected.tokens.device)]

    def project(
        self,
        features: torch.Tensor,
        cls_attention: torch.Tensor | None,
        grids: torch.Tensor | None,
        native_weight: torch.Tensor | None = None,
        *,
        num_slots: torch.Tensor | None,
    ) -> ProjectorOutput:
        """Run the projector for as many tokens as the prompt has slots; for the largest number of training without slots."""
        return self.projector(features, cls_attention, grids, native_weight, **self.token_count(num_slots))

    def token_count(self, num_slots: torch.Tensor | None) -> dict[str, int | None]:
        """Return the projector's argument ``k`` for a batch with this number of slots per sub-image, (S,), if it takes one."""
        if num_slots is None or not self.projector.takes_k:
            return {}
        # A sub-image has k slots, or all its patches if they are fewer. The maximum of a batch therefore selects as k does,
        # even if no map has k patches.
        return {"k": int(num_slots.max()) or None}

    def embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_slots: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        cls_attention: torch.Tensor | None = None,
        grids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        native_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, ProjectorOutput]:
        """Put the visual tokens into their slots.

        Args:
            input_ids: token ids, (B, L), with ``config.image_token_id`` at visual slots.
            attention_mask: mask, (B, L), 0 at padding; elsewhere 1, or the sample's number if rows hold several samples.
            num_slots: number of visual slots of each sub-image, (S,); None without images. Their maximum is the number of
                tokens per sub-image that the projector makes, so that prompt and projector cannot disagree.
            features, cls_attention, grids: encoded sub-images, see `meteor.data.collate.Batch`.
            pixel_values: normalised sub-images for the vision tower, see `encode`, if there are no features.
            native_weight: weight of the native expert, 0-d; the projector's own weight if None.

        Returns:
            Embeddings, (B, L, D); a mask, (B, L) bool, False at padding and at the projector's unused slots; and the
            projector's output.

        Raises:
            DataError: the prompt's visual slots do not match the projector's tokens.
        """
        if features is None:
            features, cls_attention, grids = self.encode(pixel_values, grids)
        num_slots = input_ids.new_zeros(len(features)) if num_slots is None else num_slots
        projected = self.project(features, cls_attention, grids, native_weight, num_slots=num_slots)
        slot_SK = _first_slots(num_slots, projected.tokens.shape[1])
        visual_BL = input_ids == self.config.image_token_id
        embeds_BLD = self.get_input_embeddings()(input_ids.masked_fill(visual_BL, 0))
        tokens_ND = projected.tokens[slot_SK].to(embeds_BLD.dtype)
        # Both numbers are read at once, as each read waits for the device.
        num_visual, num_odd = torch.stack([visual_BL.sum(), _num_odd(self.projector, projected, num_slots)]).tolist()
        if tokens_ND.shape[0] != num_visual:
            raise DataError(
                f"the prompt has {num_visual} visual slots, the projector gives {tokens_ND.shape[0]} tokens: "
                "prepare the prompt with this model's processor, and do not cut it"
            )
        if num_odd:
            raise DataError(
                f"{num_odd} of {len(num_slots)} sub-images have another number of visual slots than the projector makes of "
                f"them for k={int(num_slots.max())}: prepare all prompts of a batch with one k"
            )
        # Even without visual slots the projector stays in the graph, with zero gradients, because under ZeRO every rank
        # must take part in every reduction.
        embeds_BLD = embeds_BLD.masked_scatter(visual_BL[..., None], tokens_ND)
        attended_BL = attention_mask > 0
        attended_BL[visual_BL] = projected.mask[slot_SK]
        return embeds_BLD, attended_BL, projected

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_slots: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        cls_attention: torch.Tensor | None = None,
        grids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        turns: torch.Tensor | None = None,
        image_numbers: torch.Tensor | None = None,
        native_weight: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        aux_loss_coefficient: float = 0.0,
        skip_logits: bool = False,
        inputs_embeds: None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run a batch (`meteor.data.collate.Batch.as_inputs`) or a processor's output through the model.

        Args:
            input_ids, num_slots, features, cls_attention, grids, pixel_values, native_weight: see `embed`.
            attention_mask: see `embed`; all ones if None.
            labels: token ids, (B, L), `IGNORE_INDEX` outside answers; visual slots are never labels.
            turns, image_numbers: numbers of turns and images, (B, L), see `meteor.text.tokens.TokenisedSample`; needed by
                a text-guided sampler.
            num_items_in_batch: divisor of the summed cross-entropy, the answer tokens of the *global* batch; the answer
                tokens of this batch if None.
            aux_loss_coefficient: weight of the projector's auxiliary loss.
            skip_logits: with labels, compute logits of answers only, chunk by chunk, and return none; saves memory.
            inputs_embeds: not supported, as visual tokens are found by their ids.
            kwargs: arguments of the language model.

        Returns:
            `MeteorOutput` if labels are given; otherwise the language model's output, with ``logits`` (B, L, vocabulary).
        """
        if inputs_embeds is not None:
            raise ValueError("visual tokens are found by their ids: give input_ids instead of inputs_embeds")
        if features is None:
            features, cls_attention, grids = self.encode(pixel_values, grids)
        num_slots = input_ids.new_zeros(len(features)) if num_slots is None else num_slots
        arranged, projected = self.arrange(
            input_ids,
            attention_mask,
            turns=turns,
            image_numbers=image_numbers,
            num_slots=num_slots,
            features=features,
            cls_attention=cls_attention,
            grids=grids,
            native_weight=native_weight,
        )
        inputs = {**kwargs, **arranged.inputs, "use_cache": False}
        if labels is None:
            output = self.language_model(**inputs)
            output.logits = arranged.restore(output.logits, input_ids.shape)
            return output
        labels = labels.masked_fill(input_ids == self.config.image_token_id, IGNORE_INDEX)
        logits = None if skip_logits else self.language_model(**inputs).logits
        loss = self._answer_loss(arranged, inputs, labels, logits, num_items_in_batch)
        if projected.aux_loss is not None:
            loss = loss + aux_loss_coefficient * projected.aux_loss
        assert grids is not None, "features come with their grids"
        if logits is not None:
            logits = arranged.restore(logits, input_ids.shape)
        return MeteorOutput(loss=loss, logits=logits, selection_sums=_sum_selection(projected, grids, num_slots))

    def _token_groups(
        self, sample_BL: torch.Tensor, turns: torch.Tensor | None, image_numbers: torch.Tensor | None
    ) -> TokenGroups | None:
        """Return sample, turn and image of each token for the text-guided sampler; None without a sampler."""
        if self.text_sampler is None:
            return None
        if turns is None or image_numbers is None:
            raise DataError(
                "this model has a text-guided sampler: give turns and image_numbers, as the processor makes them"
            )
        return TokenGroups.of(sample_BL, turns, image_numbers)

    def arrange(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        turns: torch.Tensor | None = None,
        image_numbers: torch.Tensor | None = None,
        **images: Any,
    ) -> tuple[Arranged, ProjectorOutput]:
        """Arrange a batch for the language model; the arguments are those of `forward` and `embed`."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embeds_BLD, attended_BL, projected = self.embed(input_ids, attention_mask, **images)
        layout = Layout.of(attention_mask.long(), attended_BL)
        config, groups = self.language_model.config, self._token_groups(layout.sample_BL, turns, image_numbers)
        if self.text_sampler is not None and groups is not None:
            flattens = config._attn_implementation == VARLEN
            # The sampler needs the tokens where their groups are.
            self.text_sampler.begin(groups.map(layout.unpadded().take) if flattens else groups)
        return arrange(config, embeds_BLD, layout, keep_rows=self.text_sampler is not None), projected

    def _answer_loss(
        self,
        arranged: Arranged,
        inputs: dict[str, Any],
        labels_BL: torch.Tensor,
        logits: torch.Tensor | None,
        num_items: int | torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the answer tokens' summed cross-entropy divided by ``num_items`` or by their number, 0-d float32.

        Without logits the language model is run here, and its output layer sees answer tokens only.
        """
        next_N = arranged.tokens.next_labels(labels_BL)
        answers_N = (next_N != IGNORE_INDEX).nonzero().squeeze(-1)
        places_N, head = arranged.place_N[answers_N], self.get_output_embeddings()
        if logits is None and isinstance(head, AnswerHead):
            hidden = self.language_model.base_model(**inputs).last_hidden_state
            loss = head(hidden.flatten(0, 1)[places_N], next_N[answers_N])
        else:
            logits = self.language_model(**inputs).logits if logits is None else logits
            loss = F.cross_entropy(logits.flatten(0, 1)[places_N].float(), next_N[answers_N], reduction="sum")
        # A batch without answers has loss 0, not 0 / 0.
        return loss / (max(len(answers_N), 1) if num_items is None else num_items)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_slots: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        cls_attention: torch.Tensor | None = None,
        grids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        turns: torch.Tensor | None = None,
        image_numbers: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer prompts that are padded on the left; `embed` describes the prompt's arguments.

        Args:
            inputs: token ids, (B, L), if ``input_ids`` is None.
            generation_config: the model's own ``generation_config`` if None, which ends answers as they were taught to end.
            kwargs: other arguments of Hugging Face's ``generate``. Answers end where the language model's positions end, with
                a warning, if ``max_new_tokens`` allows more.

        Returns:
            Token ids of the prompts and their answers, (B, L + new tokens), or what ``return_dict_in_generate`` asks for.

        Raises:
            SettingsError: a model with a text-guided sampler is asked for several beams or answers per prompt.
            TooLongError: a prompt needs more positions than the language model has.
        """
        kwargs.pop("labels", None)
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None:
            raise ValueError("generate needs input_ids: prepare a prompt with the model's processor")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embeds_BLD, attended_BL, _ = self.embed(
            input_ids, attention_mask, num_slots, features, cls_attention, grids, pixel_values
        )
        longest_answer = (
            kwargs.get("max_new_tokens") or (generation_config or self.generation_config).max_new_tokens or 1
        )
        most_tokens = check_room(self.language_model.config, int(attended_BL.sum(dim=1).max()), 1)
        if most_tokens is not None and most_tokens < longest_answer:
            _LOG.warning("answers end after %d tokens, where the language model's positions end", most_tokens)
            kwargs["max_new_tokens"] = most_tokens
        if generation_config is None:
            self.language_model.generation_config = self.generation_config
        else:
            kwargs["generation_config"] = generation_config
        if self.text_sampler is None:
            # With the ids beside the embeddings, the result begins with the prompt.
            ids_BK, embeds_BKD, attended_BK = close_gaps(attended_BL, input_ids, embeds_BLD)
            prompt = {"inputs": ids_BK, "inputs_embeds": embeds_BKD, "attention_mask": attended_BK.long()}
            return restore_prompts(self.language_model.generate(**prompt, **kwargs), input_ids, ids_BK.shape[1])
        if max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1) > 1:
            raise SettingsError("a model with a text-guided sampler gives one answer per prompt: leave num_beams at 1")
        self.text_sampler.begin(self._token_groups(attended_BL.long(), turns, image_numbers))
        prompt = {"inputs": input_ids, "inputs_embeds": embeds_BLD, "attention_mask": attended_BL.long()}
        try:
            return self.language_model.generate(**prompt, **kwargs)
        finally:
            self.text_sampler.begin(None)


def _first_slots(num_slots: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return a mask of the first ``num_slots`` (S,) of the projector's tokens, (S, K) bool."""
    return torch.arange(num_tokens, device=num_slots.device) < num_slots[:, None]


def _num_odd(projector: Projector, projected: ProjectorOutput, num_slots: torch.Tensor) -> torch.Tensor:
    """Count the sub-images whose slots are not the projector's tokens, 0-d; 0 for projectors with unused slots."""
    if not projector.takes_k:
        return num_slots.new_zeros(())
    return ((num_slots > 0) & (projected.mask.sum(dim=1) != num_slots)).sum()


def _sum_selection(projected: ProjectorOutput, grids_S2: torch.Tensor, num_slots: torch.Tensor) -> torch.Tensor | None:
    """Sum the selection's statistics for `MeteorOutput`; sub-images without visual slots are not counted."""
    visual_SP, native_SP = projected.visual_scores, projected.native_scores
    if visual_SP is None or native_SP is None:
        return None
    num_patches_S1 = (grids_S2.prod(dim=1) * (num_slots > 0)).unsqueeze(1)
    mask_SP = torch.arange(visual_SP.shape[1], device=visual_SP.device) < num_patches_S1.to(visual_SP.device)
    return sum_selection(visual_SP, native_SP, mask_SP, k=projected.tokens.shape[1])


def _register() -> None:
    AutoModelForImageTextToText.register(MeteorConfig, MeteorForConditionalGeneration)
    # `transformers serve` reads this list of names before it asks for the class; earlier versions have neither.
    names = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", None)
    if names is not None:
        names[MeteorConfig.model_type] = MeteorForConditionalGeneration.__name__
        modeling_auto.AutoModelForMultimodalLM.register(MeteorConfig, MeteorForConditionalGeneration)


_register()
