"""The model without its output layer, for trainers that compute the output layer by themselves."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

if TYPE_CHECKING:
    from meteor.model.modeling import MeteorForConditionalGeneration

# Arguments of the model; all others are the language model's.
_OWN = ("num_slots", "features", "cls_attention", "grids", "pixel_values", "turns", "image_numbers")


class MeteorModel(nn.Module):
    """A view of the model without its output layer, which shares all parameters."""

    def __init__(self, whole: "MeteorForConditionalGeneration") -> None:
        super().__init__()
        self.vision_tower, self.projector = whole.vision_tower, whole.projector
        self.language_model = whole.language_model.base_model
        # A list hides the model from torch, which would else count its modules twice.
        self._whole = [whole]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Return the hidden states before the output layer as ``last_hidden_state``, (B, L, D)."""
        [whole] = self._whole
        own = {name: kwargs.pop(name) for name in _OWN if name in kwargs}
        arranged, _ = whole.arrange(input_ids, attention_mask, **own)
        hidden = self.language_model(**{**kwargs, **arranged.inputs, "use_cache": False}).last_hidden_state
        return BaseModelOutputWithPast(last_hidden_state=arranged.restore(hidden, input_ids.shape))
