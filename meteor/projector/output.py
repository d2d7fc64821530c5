"""Base class and output type of all projectors.

Letters: B sub-images, P patches, K kept tokens, D LLM width.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class ProjectorOutput:
    """Visual tokens of a batch of sub-images.

    Attributes:
        tokens: visual tokens, (B, K, D); zero at slots where ``mask`` is False.
        mask: mask of token slots, (B, K) bool, True at real tokens; they come first.
        indices: patch that each token represents, (B, K) long, 0 at slots where ``mask`` is False; None if a token
            represents more than one patch.
        visual_scores: share of the class token's attention, (B, P), without gradient; None if not computed.
        native_scores: softmax of the similarity to the instruction token, (B, P), without gradient; None if not computed.
        aux_loss: auxiliary loss, 0-d, to be added to the training loss; None if the projector has none.
    """

    tokens: Tensor
    mask: Tensor
    indices: Tensor | None = None
    visual_scores: Tensor | None = None
    native_scores: Tensor | None = None
    aux_loss: Tensor | None = None


class Projector(nn.Module):
    """Base of all projectors: ``forward(features, cls_attention, grids, native_weight=None) -> ProjectorOutput``.

    The arguments of ``forward`` are

    - features: patch features, (B, P, C), any floating dtype; padding may hold anything. B may be 0, and then P too.
    - cls_attention: importance row, for CLIP the attention of the class token over patches, (B, P); padding may hold anything.
    - grids: patch grid (Hu, Wu) of each sub-image, (B, 2) integer, on any device.
    - native_weight: weight of the native expert during warm-up, 0-d; ignored by projectors without this expert.

    Sub-images do not see each other. K, the second dimension of the tokens, is at least the number that
    `meteor.image.budget` gives each sub-image of the batch. ``forward`` raises ValueError if a shape is wrong or a grid does
    not fit P.

    Attributes:
        settings: name, widths and every setting as JSON values, set by `build_projector`;
            ``build_projector(**settings)`` makes an equal module.
    """

    settings: dict[str, Any]
