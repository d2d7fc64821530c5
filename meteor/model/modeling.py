"""The model: features of sub-images -> projector -> visual tokens in the prompt -> language model.

Letters: B samples, L sequence, S sub-images of all samples, P patches, C vision width, K tokens per sub-image, D LLM width.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from meteor.checksums import check_folder
from meteor.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from meteor.data.collate import empty_sub_image, pad_sub_images
from meteor.errors import DataError, SettingsError
from meteor.model.answers import answer_head
from meteor.model.attention import VARLEN, Layout
from meteor.model.configuration import MeteorConfig
from meteor.model.language_model import accept_embeddings, set_supported_attention
from meteor.model.rows import Arranged, arrange, close_gaps
from meteor.model.text_sampler import TextSampler, TokenGroups
from meteor.model_files import require_config
from meteor.projector import Projector, ProjectorOutput, build_projector
from meteor.projector.statistics import sum_selection
from meteor.vision.encoder import FrozenClip


@dataclass
class MeteorOutput(CausalLMOutputWithPast):
    """Output of a forward pass with labels.

    Attributes:
        loss: training loss, 0-d float32.
        logits: always None, because all logits are never in memory at the same time.
        selection_sums: sums of `meteor.projector.statistics` over the sub-images with visual slots,
            (`meteor.projector.statistics.NUM_SUMS`,) float32, without gradient; None for projectors without both experts'
            scores.
    """

    selection_sums: torch.Tensor | None = None


class MeteorForConditionalGeneration(PreTrainedModel):
    """LLaVA-Meteor: a language model that reads projected vision features.

    Training uses cached features and omits the vision tower (``vision_tower=False``). A finished model contains the tower
    that made its cache, so that it can encode images itself.
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
            language_model
            if language_model is not None
            else AutoModelForCausalLM.from_config(config.text_config, attn_implementation="eager")
        )
        accept_embeddings(self.language_model)
        self._has_answer_head = answer_head(self.language_model) is not None
        self.text_sampler = TextSampler(self.language_model, **config.text_sampler) if config.text_sampler else None
        # transformers passes its choice of attention to a model's own layers only, and clears it in the configs of parts.
        for part in filter(None, (self.language_model, self.vision_tower)):
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

    def frozen_clip(self) -> FrozenClip:
        """Return the vision tower as an encoder.

        Raises:
            DataError: the model was loaded without its vision tower.
        """
        if self.vision_tower is None:
            raise DataError("this model was built without its vision tower; load it with vision_tower=True")
        select_layer, identity = self.config.select_layer, self.config.cache_identity or {}
        # The cache's digest is taken over: hashing the weights takes about 1 s, and these weights may have been cast.
        known: dict[str, Any] = {"digest": identity.get("encoder_digest")}
        known |= {name: identity["preprocessing"][name] for name in ("mean", "std") if identity}
        return FrozenClip(self.vision_tower, select_layer=select_layer, attention_layers=(select_layer,), **known)

    def encode(self, pixel_values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode normalised sub-images (3, h, w) to features (S, P, C), class-token attention (S, P) and grids (S, 2)."""
        clip = self.frozen_clip()
        encoded = [(image.features, image.cls_attention[0], image.grid) for image in clip.encode(pixel_values)]
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
            input_ids: token ids, (B, L), with `IMAGE_TOKEN_ID` at visual slots.
            attention_mask: mask, (B, L), 0 at padding; elsewhere 1, or the sample's number if rows hold several samples.
            num_slots: number of visual slots of each sub-image, (S,).
            features, cls_attention, grids: encoded sub-images, see `meteor.data.collate.Batch`; None with pixel_values.
            pixel_values: S normalised sub-images (3, h, w) for the vision tower, if there are no features.
            native_weight: weight of the native expert, 0-d; the projector's own weight if None.

        Returns:
            Embeddings, (B, L, D); a mask, (B, L) bool, False at padding and at the projector's unused slots; and the
            projector's output.

        Raises:
            DataError: the prompt's visual slots do not match the projector's tokens.
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
        # Even without visual slots the projector stays in the graph, with zero gradients, because under ZeRO every rank
        # must take part in every reduction.
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
        """Run a batch (`meteor.data.collate.Batch.as_inputs`) through the model; `embed` describes the other arguments.

        Args:
            labels: token ids, (B, L), `IGNORE_INDEX` outside answers. Logits are computed for answers only, chunk by chunk.
            turns, image_numbers: numbers of turns and images, (B, L), see `meteor.text.tokens.TokenisedSample`; needed by
                a text-guided sampler.
            num_items_in_batch: divisor of the summed cross-entropy, the answer tokens of the *global* batch; the answer
                tokens of this batch if None.
            aux_loss_coefficient: weight of the projector's auxiliary loss.

        Returns:
            `MeteorOutput` if labels are given; otherwise the language model's output, with ``logits`` (B, L, vocabulary).
        """
        if features is None:
            features, cls_attention, grids = self.encode(pixel_values or [])
        embeds_BLD, attended_BL, projected = self.embed(
            input_ids, attention_mask, num_slots, features, cls_attention, grids, native_weight=native_weight
        )
        layout = Layout.of(attention_mask.long(), attended_BL)
        groups = self._token_groups(layout.sample_BL, turns, image_numbers)
        if labels is None:
            return self._logits(embeds_BLD, layout, groups, **kwargs)
        loss = self._answer_loss(embeds_BLD, layout, groups, labels, num_items_in_batch, **kwargs)
        if projected.aux_loss is not None:
            loss = loss + aux_loss_coefficient * projected.aux_loss
        assert grids is not None, "features come with their grids"
        return MeteorOutput(loss=loss, selection_sums=_sum_selection(projected, grids, num_slots))

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

    def _arrange(self, embeds_BLD: torch.Tensor, layout: Layout, groups: TokenGroups | None) -> Arranged:
        """Arrange the samples for the language model; the text-guided sampler needs them where their groups are."""
        config = self.language_model.config
        if self.text_sampler is not None and groups is not None:
            flattens = config._attn_implementation == VARLEN
            self.text_sampler.begin(groups.map(layout.unpadded().take) if flattens else groups)
        return arrange(config, embeds_BLD, layout, keep_rows=self.text_sampler is not None)

    def _logits(
        self, embeds_BLD: torch.Tensor, layout: Layout, groups: TokenGroups | None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        arranged = self._arrange(embeds_BLD, layout, groups)
        output = self.language_model(**arranged.inputs, use_cache=False, **kwargs)
        output.logits = arranged.restore(output.logits, embeds_BLD.shape[:2])
        return output

    def _answer_loss(
        self,
        embeds_BLD: torch.Tensor,
        layout: Layout,
        groups: TokenGroups | None,
        labels_BL: torch.Tensor,
        num_items: int | torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the answer tokens' summed cross-entropy divided by ``num_items`` or by their number, 0-d float32."""
        arranged = self._arrange(embeds_BLD, layout, groups)
        next_N = arranged.tokens.next_labels(labels_BL)
        answers_N = (next_N != IGNORE_INDEX).nonzero().squeeze(-1)
        places_N = arranged.place_N[answers_N]
        inputs = {**arranged.inputs, "use_cache": False, **kwargs}
        if self._has_answer_head:
            hidden = self.language_model.base_model(**inputs).last_hidden_state
            loss = self.language_model.get_output_embeddings()(hidden.flatten(0, 1)[places_N], next_N[answers_N])
        else:
            logits = self.language_model(**inputs).logits.flatten(0, 1)[places_N]
            loss = F.cross_entropy(logits.float(), next_N[answers_N], reduction="sum")
        # A batch without answers has loss 0, not 0 / 0.
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
        """Answer prompts that are padded on the left; other arguments go to Hugging Face's ``generate``.

        Returns:
            Token ids of the answers without their prompts, (B, new tokens).

        Raises:
            SettingsError: a model with a text-guided sampler is asked for several beams or answers per prompt.
        """
        kwargs.pop("labels", None)
        embeds_BLD, attended_BL, _ = self.embed(
            input_ids, attention_mask, num_slots, features, cls_attention, grids, pixel_values
        )
        if self.text_sampler is None:
            embeds_BLD, attended_BL = close_gaps(embeds_BLD, attended_BL)
            inputs = {"inputs_embeds": embeds_BLD, "attention_mask": attended_BL.long()}
            return self.language_model.generate(**inputs, **kwargs)
        if max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1) > 1:
            raise SettingsError("a model with a text-guided sampler gives one answer per prompt: leave num_beams at 1")
        self.text_sampler.begin(self._token_groups(attended_BL.long(), turns, image_numbers))
        inputs = {"inputs_embeds": embeds_BLD, "attention_mask": attended_BL.long()}
        try:
            return self.language_model.generate(**inputs, **kwargs)
        finally:
            self.text_sampler.begin(None)


def _sum_selection(projected: ProjectorOutput, grids_S2: torch.Tensor, num_slots: torch.Tensor) -> torch.Tensor | None:
    """Sum the selection's statistics for `MeteorOutput`; sub-images without visual slots are not counted."""
    visual_SP, native_SP = projected.visual_scores, projected.native_scores
    if visual_SP is None or native_SP is None:
        return None
    num_patches_S1 = (grids_S2.prod(dim=1) * (num_slots > 0)).unsqueeze(1)
    mask_SP = torch.arange(visual_SP.shape[1], device=visual_SP.device) < num_patches_S1.to(visual_SP.device)
    return sum_selection(visual_SP, native_SP, mask_SP, k=projected.tokens.shape[1])


AutoModelForImageTextToText.register(MeteorConfig, MeteorForConditionalGeneration)
