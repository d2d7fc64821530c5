"""What every projector is and returns.

Letters: B sub-images, P patches, K kept tokens, D LLM width.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class ProjectorOutput:
    """Visual tokens of a batch of sub-images.

    Attributes:
        tokens: (B, K, D); zero where ``mask`` is False.
        mask: (B, K) bool, True at real tokens; they come first.
        indices: (B, K) long, the patch each token stands for, 0 where ``mask`` is False; None if tokens stand for no
            single patch.
        visual_scores: (B, P) share of the class token's attention, without gradient; None if not computed.
        native_scores: (B, P) softmax of similarity to the instruction token, without gradient; None if not computed.
        aux_loss: 0-d, to be added to the loss; None if the projector has none.
    """

    tokens: Tensor
    mask: Tensor
    indices: Tensor | None = None
    visual_scores: Tensor | None = None
    native_scores: Tensor | None = None
    aux_loss: Tensor | None = None


class Projector(nn.Module):
    """Base of all projectors: ``forward(features, cls_attention, grids, native_weight=None) -> ProjectorOutput``.

    All of them take

    - features: (B, P, C), any floating dtype; padding may hold anything. B may be 0, and then P too.
    - cls_attention: (B, P), the class token's attention over patches; padding may hold anything.
    - grids: (B, 2) integer, (Hu, Wu) of each sub-image, on any device.
    - native_weight: 0-d, of the native expert during warm-up, where there is one.

    No sub-image sees another. K, the tokens' second dimension, is at least what `meteor.image.budget` gives each sub-image of
    the batch. A wrong shape, or a grid that does not fit P, is a ValueError.

    Attributes:
        settings: the name and every setting, as JSON values: ``build_projector(**settings)`` makes an equal module. Set
            by `build_projector`.
    """

    settings: dict[str, Any]
