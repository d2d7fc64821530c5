"""The model: features of sub-images -> projector -> visual tokens in the prompt -> language model.

Letters: B samples, L sequence, S sub-images of all samples, P patches, C vision width, K tokens of a sub-image, D LLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from meteor.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from meteor.data.collate import empty_sub_image, pad_sub_images
from meteor.errors import DataError, SettingsError
from meteor.model.answers import answer_head
from meteor.model.attention import VARLEN, Layout, Unpadded
from meteor.model.configuration import MeteorConfig
from meteor.model.text_sampler import Marks, TextSampler
from meteor.projector import Projector, ProjectorOutput, build_projector
from meteor.projector.statistics import sum_selection
from meteor.vision.encoder import FrozenClip


@dataclass
class MeteorOutput(CausalLMOutputWithPast):
    """What a pass with labels returns.

    Attributes:
        loss: 0-d float32.
        logits: None; they are never all in memory.
        selection_sums: (`meteor.projector.statistics.NUM_SUMS`,) float32 of the sub-images with visual slots, without
            gradient; None for projectors that do not have both experts' scores.
    """

    selection_sums: torch.Tensor | None = None


class MeteorForConditionalGeneration(PreTrainedModel):
    """LLaVA-Meteor: a language model that reads projected vision features.

    Training feeds it cached features and leaves the vision tower out (``vision_tower=False``); a finished model holds the
    tower whose digest its cache names, so that it sees images by itself.
    """

    config_class = MeteorConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer"]  # noqa: RUF012  (transformers reads a plain list)
    _keys_to_ignore_on_load_unexpected = [r"^vision_tower\."]  # noqa: RUF012

    def __init__(self, config: MeteorConfig, *, vision_tower: bool = True, language_model: nn.Module | None = None):
        super().__init__(config)
        self.vision_tower = CLIPVisionModel(config.vision_config) if vision_tower else None
        self.projector: Projector = build_projector(
            **config.projector,
            vision_width=config.vision_config.hidden_size,
            llm_width=config.text_config.hidden_size,
        )
        self.language_model: Any = (
            language_model if language_model is not None else AutoModelForCausalLM.from_config(config.text_config)
        )
        self._has_answer_head = answer_head(self.language_model) is not None
        self.text_sampler = TextSampler(self.language_model, **config.text_sampler) if config.text_sampler else None
        # transformers hands its choice of attention to a model's own layers alone, and clears it in the parts' configs.
        for part in filter(None, (self.language_model, self.vision_tower)):
            part.set_attn_implementation(self.config._attn_implementation)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Every part initialises itself; transformers' default would overwrite the scan's."""

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def frozen_clip(self) -> FrozenClip:
        """The vision tower as an encoder; `DataError` where the model was loaded without it."""
        if self.vision_tower is None:
            raise DataError("this model was built without its vision tower; load it with vision_tower=True")
        select_layer, identity = self.config.select_layer, self.config.cache_identity or {}
        # The digest is the cache's: hashing the weights takes a second, and those here may have been cast.
        known: dict[str, Any] = {"digest": identity.get("encoder_digest")}
        known |= {name: identity["preprocessing"][name] for name in ("mean", "std") if identity}
        return FrozenClip(self.vision_tower, select_layer=select_layer, attention_layers=(select_layer,), **known)

    def encode(self, pixel_values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features (S, P, C), class-token attention (S, P) and patch grids (S, 2) of normalised sub-images (3, h, w)."""
        clip = self.frozen_clip()
        encoded = [(one.features, one.cls_attention[0], one.grid) for one in clip.encode(pixel_values)]
        if not encoded:
            encoded = [empty_sub_image(clip.width)]
        features_SPC, cls_attention_SP = pad_sub_images(encoded)
        grids_S2 = torch.tensor([grid for _, _, grid in encoded])
        return features_SPC.to(self.device), cls_attention_SP.to(self.device), grids_S2.to(self.device)

    def embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_slots: torch.Tensor,
        features: torch.Tensor | None = None,
        cls_attention: torch.Tensor | None = None,
        grids: torch.Tensor | None = None,
        pixel_values: Sequence[torch.Tensor] | None = None,
        native_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, ProjectorOutput]:
        """Put the visual tokens into their slots.

        Args:
            input_ids: (B, L), `IMAGE_TOKEN_ID` at visual slots.
            attention_mask: (B, L), 0 at padding; elsewhere 1, or the number of the sample where rows hold several.
            num_slots: (S,), visual slots of each sub-image.
            features, cls_attention, grids: of the S sub-images, see `meteor.data.collate.Batch`; or instead
            pixel_values: S normalised sub-images (3, h, w), which the vision tower encodes here.
            native_weight: 0-d, weight of the native expert; the projector's own where None.

        Returns:
            Embeddings (B, L, D); (B, L) bool, False at padding and at the projector's unused slots; its output.
        """
        if features is None:
            features, cls_attention, grids = self.encode(pixel_values or [])
        projected = self.projector(features, cls_attention, grids, native_weight)
        slot_SK = torch.arange(projected.tokens.shape[1], device=num_slots.device) < num_slots[:, None]
        visual_BL = input_ids == IMAGE_TOKEN_ID
        embeds_BLD = self.get_input_embeddings()(input_ids.masked_fill(visual_BL, 0))
        tokens_ND = projected.tokens[slot_SK].to(embeds_BLD.dtype)
        if tokens_ND.shape[0] != int(visual_BL.sum()):
            raise DataError(
                f"the prompt has {int(visual_BL.sum())} visual slots, the projector gives {tokens_ND.shape[0]} tokens: "
                "collate with this projector's token budget"
            )
        # Without any slot too, the projector stays in the graph, with zero gradients: under ZeRO every rank takes part in
        # every reduction.
        embeds_BLD = embeds_BLD.masked_scatter(visual_BL[..., None], tokens_ND)
        attended_BL = attention_mask > 0
        attended_BL[visual_BL] = projected.mask[slot_SK]
        return embeds_BLD, attended_BL, projected

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_slots: torch.Tensor,
        features: torch.Tensor | None = None,
        cls_attention: torch.Tensor | None = None,
        grids: torch.Tensor | None = None,
        pixel_values: Sequence[torch.Tensor] | None = None,
        labels: torch.Tensor | None = None,
        turns: torch.Tensor | None = None,
        image_numbers: torch.Tensor | None = None,
        native_weight: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        aux_loss_coefficient: float = 0.0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass over a batch (`meteor.data.collate.Batch.as_inputs`).

        Args:
            labels: (B, L), `IGNORE_INDEX` outside answers. Logits are computed for answers alone, a chunk at a time.
            turns, image_numbers: (B, L), see `meteor.text.tokens.TokenisedSample`; a text-guided sampler needs them.
            num_items_in_batch: what the summed cross-entropy is divided by: the answer tokens of the *global* batch;
                those of this batch when None.
            aux_loss_coefficient: weight of the projector's own loss.

        Returns:
            `MeteorOutput` with labels; without, what the language model returns, ``logits`` (B, L, vocabulary) in it.
        """
        if features is None:
            features, cls_attention, grids = self.encode(pixel_values or [])
        embeds_BLD, attended_BL, projected = self.embed(
            input_ids, attention_mask, num_slots, features, cls_attention, grids, native_weight=native_weight
        )
        layout = Layout.of(attention_mask.long(), attended_BL)
        marks = self._marks(layout.sample_BL, turns, image_numbers)
        if labels is None:
            return self._logits(embeds_BLD, layout, marks, **kwargs)
        loss = self._answer_loss(embeds_BLD, layout, marks, labels, num_items_in_batch, **kwargs)
        if projected.aux_loss is not None:
            loss = loss + aux_loss_coefficient * projected.aux_loss
        assert grids is not None, "features come with their grids"
        return MeteorOutput(loss=loss, selection_sums=_sum_selection(projected, grids, num_slots))

    def _marks(
        self, sample_BL: torch.Tensor, turns: torch.Tensor | None, image_numbers: torch.Tensor | None
    ) -> Marks | None:
        """What the text-guided sampler needs to know; None without one."""
        if self.text_sampler is None:
            return None
        if turns is None or image_numbers is None:
            raise DataError(
                "this model has a text-guided sampler: give turns and image_numbers, as the processor makes them"
            )
        return Marks.of(sample_BL, turns, image_numbers)

    def _inputs(
        self, embeds_BLD: torch.Tensor, layout: Layout, marks: Marks | None
    ) -> tuple[dict[str, Any], Unpadded | None]:
        """Arguments of the language model, and how its rows were flattened if they were."""
        config = self.language_model.config
        if self.text_sampler is not None and marks is not None:
            flattens = config._attn_implementation == VARLEN
            self.text_sampler.begin(marks.map(layout.unpadded().take) if flattens else marks)
        if config._attn_implementation != VARLEN:
            mask = layout.mask(config, embeds_BLD.dtype)
            return {"inputs_embeds": embeds_BLD, "attention_mask": mask, "position_ids": layout.position_BL}, None
        flat = layout.unpadded()
        inputs = {"inputs_embeds": flat.take(embeds_BLD), "position_ids": flat.position_1N}
        return {**inputs, **flat.attention_arguments()}, flat

    def _logits(
        self, embeds_BLD: torch.Tensor, layout: Layout, marks: Marks | None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        inputs, flat = self._inputs(embeds_BLD, layout, marks)
        output = self.language_model(**inputs, use_cache=False, **kwargs)
        if flat is not None:
            output.logits = flat.restore(output.logits, embeds_BLD.shape[:2])
        return output

    def _answer_loss(
        self,
        embeds_BLD: torch.Tensor,
        layout: Layout,
        marks: Marks | None,
        labels_BL: torch.Tensor,
        num_items: int | torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Summed cross-entropy of the answer tokens, divided by ``num_items`` or by how many there are; 0-d float32."""
        inputs, flat = self._inputs(embeds_BLD, layout, marks)
        tokens = flat or layout.unpadded()
        next_N = tokens.next_labels(labels_BL)
        answers_N = (next_N != IGNORE_INDEX).nonzero().squeeze(-1)
        # Where the language model's output for these tokens is: it has rows, or all tokens in one.
        places_N = answers_N if flat is not None else tokens.kept_N[answers_N]
        inputs |= {"use_cache": False, **kwargs}
        if self._has_answer_head:
            hidden = self.language_model.base_model(**inputs).last_hidden_state
            loss = self.language_model.get_output_embeddings()(hidden.flatten(0, 1)[places_N], next_N[answers_N])
        else:
            logits = self.language_model(**inputs).logits.flatten(0, 1)[places_N]
            loss = F.cross_entropy(logits.float(), next_N[answers_N], reduction="sum")
        return loss / (max(len(answers_N), 1) if num_items is None else num_items)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_slots: torch.Tensor,
        features: torch.Tensor | None = None,
        cls_attention: torch.Tensor | None = None,
        grids: torch.Tensor | None = None,
        pixel_values: Sequence[torch.Tensor] | None = None,
        turns: torch.Tensor | None = None,
        image_numbers: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Answer prompts, padded on the left; everything else is an argument of Hugging Face's ``generate``.

        Returns:
            (B, new tokens), the answers alone.

        Raises:
            SettingsError: several beams or answers a prompt, of a model with a text-guided sampler.
        """
        kwargs.pop("labels", None)
        embeds_BLD, attended_BL, _ = self.embed(
            input_ids, attention_mask, num_slots, features, cls_attention, grids, pixel_values
        )
        inputs = {"inputs_embeds": embeds_BLD, "attention_mask": attended_BL.long()}
        if self.text_sampler is None:
            return self.language_model.generate(**inputs, **kwargs)
        if max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1) > 1:
            raise SettingsError("a model with a text-guided sampler gives one answer a prompt: leave num_beams at 1")
        self.text_sampler.begin(self._marks(attended_BL.long(), turns, image_numbers))
        try:
            return self.language_model.generate(**inputs, **kwargs)
        finally:
            self.text_sampler.begin(None)


def _sum_selection(projected: ProjectorOutput, grids_S2: torch.Tensor, num_slots: torch.Tensor) -> torch.Tensor | None:
    """See `MeteorOutput`; the stand-in of a batch without images has no slots and is not counted."""
    visual_SP, native_SP = projected.visual_scores, projected.native_scores
    if visual_SP is None or native_SP is None:
        return None
    num_patches_S1 = (grids_S2.prod(dim=1) * (num_slots > 0)).unsqueeze(1)
    mask_SP = torch.arange(visual_SP.shape[1], device=visual_SP.device) < num_patches_S1.to(visual_SP.device)
    return sum_selection(visual_SP, native_SP, mask_SP, k=projected.tokens.shape[1])


AutoModelForImageTextToText.register(MeteorConfig, MeteorForConditionalGeneration)
