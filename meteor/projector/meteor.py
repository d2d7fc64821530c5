"""LLaVA-Meteor's projector: Flash Global Fusion, Visual-Native Selection, then a map to the LLM's width.

Letters: B sub-images, P patches, K kept tokens, C vision width, X width of fusion, D LLM width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meteor.image.elastic import TokenCounts
from meteor.projector.checks import check_choice, check_count, check_fraction, check_positive
from meteor.projector.fusion import FlashGlobalFusion
from meteor.projector.inputs import prepare_features
from meteor.projector.mlp import two_layer_mlp
from meteor.projector.output import Projector, ProjectorOutput
from meteor.projector.selection import EXPERTS, Selection, select_tokens
from meteor.ssm.tensors import gather_rows

SELECTION_GRADIENTS = ("none", "straight_through")
LAYOUTS = ("mlp_after_selection", "llm_width")
INSTRUCTION_STD = 0.02


@dataclass(frozen=True)
class SelectionSettings:
    """Settings of the token selection; `build_meteor` describes them."""

    k: int
    visual_weight: float
    experts: str
    gradient: str
    native_scale: float

    def __post_init__(self) -> None:
        check_count("k", self.k)
        check_fraction("visual_weight", self.visual_weight)
        check_choice("experts", self.experts, EXPERTS)
        check_choice("selection_gradient", self.gradient, SELECTION_GRADIENTS)
        check_positive("native_scale", self.native_scale)


class MeteorProjector(Projector):
    """Projector that fuses a sub-image's tokens, keeps the best k, and maps these to the LLM's width.

    Args:
        entry: map from width C to X before fusion, for tokens and INS.
        fusion: fusion module of width X.
        head: map from width X to D, applied to kept tokens.
        vision_width: width of the features, C.
        selection: settings of the token selection.
    """

    takes_k = True

    def __init__(
        self,
        entry: nn.Module,
        fusion: FlashGlobalFusion,
        head: nn.Module,
        *,
        vision_width: int,
        selection: SelectionSettings,
    ) -> None:
        super().__init__()
        self.vision_width = vision_width
        self.selection = selection
        self.instruction = nn.Parameter(INSTRUCTION_STD * torch.randn(1, vision_width))
        self.entry = entry
        self.fusion = fusion
        self.head = head

    def forward(
        self,
        features: Tensor,
        cls_attention: Tensor,
        grids: Tensor,
        native_weight: Tensor | None = None,
        k: int | None = None,
    ) -> ProjectorOutput:
        """Compress a batch of sub-images, each by itself. B may be 0, and then P too.

        The method compiles without a graph break: eagerly, values are checked on the host; in a compiled graph, the
        assertions are part of the graph.

        Args:
            features: patch features, (B, P, C), any floating dtype; padding may hold anything.
            cls_attention: attention of the class token over patches, (B, P), finite and not negative; padding may hold
                anything.
            grids: patch grid (Hu, Wu) of each sub-image, (B, 2) integer, on any device.
            native_weight: weight of the native expert during warm-up, 0-d; 1 - visual_weight if None.
            k: most tokens to keep per sub-image; the largest number of training if None.

        Returns:
            Tokens, (B, K, D), in the weights' dtype and in map order, K = min(k, P), with both experts' scores.

        Raises:
            ValueError: a shape is wrong, a grid does not fit P, attention at a real patch is NaN, infinite or negative, or
                a native score's dot product is not finite.
        """
        feature_BPC, mask_BP = prepare_features(
            features, cls_attention, grids, vision_width=self.vision_width, dtype=self.instruction.dtype
        )
        fused_BPX, instruction_BX = self.fusion(self.entry(feature_BPC), self.entry(self.instruction), mask_BP, grids)
        selection = select_tokens(
            fused_BPX,
            instruction_BX,
            cls_attention,
            mask_BP,
            k=self.selection.k if k is None else k,
            visual_weight=self.selection.visual_weight,
            native_weight=native_weight,
            experts=self.selection.experts,
            native_scale=self.selection.native_scale,
        )
        kept_BKX = gather_rows(fused_BPX, selection.indices)
        if self.selection.gradient == "straight_through":
            kept_BKX = _let_scores_learn(kept_BKX, selection)
        return ProjectorOutput(
            tokens=torch.where(selection.mask.unsqueeze(-1), self.head(kept_BKX), 0),
            mask=selection.mask,
            indices=selection.indices,
            visual_scores=selection.visual_scores.detach(),
            native_scores=selection.native_scores.detach(),
        )


def _let_scores_learn(kept_BKX: Tensor, selection: Selection) -> Tensor:
    """Multiply by 1 + AS_i - stop_gradient(AS_i): exactly 1 in value, with the gradient of the score."""
    score_BK = selection.scores.gather(1, selection.indices)
    # The difference comes first, because 1 + a - a need not be 1 in floating point.
    factor_BK = 1 + (score_BK - score_BK.detach())
    return kept_BKX * factor_BK.unsqueeze(-1).to(kept_BKX.dtype)


def build_meteor(
    layout: str,
    /,
    vision_width: int,
    llm_width: int,
    *,
    k: int | list[int] | dict[str, int] = 144,
    visual_weight: float = 0.8,
    experts: str = "visual_native",
    selection_gradient: str = "none",
    window: int = 3,
    local: str = "mean",
    scan: str = "local_to_single",
    state_size: int = 16,
    scan_backend: str = "auto",
    native_scale: float = 1.0,
) -> MeteorProjector:
    """Build LLaVA-Meteor's projector in one of two layouts.

    ``"mlp_after_selection"`` (the preset ``meteor``) fuses at the vision width, with shared projections and without
    expansion, and applies the MLP to kept tokens: 34,991,104 parameters at C = 1024, D = 5120. ``"llm_width"`` (the preset
    ``meteor_37m``) maps C to D with a Linear layer, then has a whole SSM block per direction at width D with C scan
    channels, and no further projection: 37,081,088 parameters. These are the paper's 37.08 M, but the authors' layout may
    still differ.

    Args:
        layout: ``"mlp_after_selection"`` or ``"llm_width"``.
        vision_width: width of the features, C.
        llm_width: width of the LLM's embeddings, D.
        k: most tokens to keep per sub-image, or several numbers (`meteor.image.elastic`), of which the largest is the default.
        visual_weight: weight of the visual expert, lambda, in [0, 1].
        experts: experts that rank the tokens, ``"visual_native"``, ``"visual"`` or ``"native"``.
        selection_gradient: ``"none"`` (the paper) or ``"straight_through"``: kept tokens are multiplied by
            1 + AS_i - stop_gradient(AS_i), so that the native expert is trained directly.
        window: side of the local window in patches, 3, 5 or 7.
        local: operation that summarises a window, ``"mean"`` or ``"conv"``.
        scan: visiting order, ``"single"``, ``"local_to_single"`` or ``"both"``.
        state_size: size of the scan state.
        scan_backend: backend of the scan, see `meteor.ssm.selective_scan`.
        native_scale: factor above 0 in NS = softmax(native_scale * <F_i, INS>) (equation 4). The paper uses 1. At the
            fusion's width of 1024 an unscaled dot product makes the softmax nearly one-hot; width ** -0.5 is attention's
            usual scale.

    Raises:
        SettingsError: a setting has a value that is not listed above.
    """
    check_choice("layout", layout, LAYOUTS)
    selection = SelectionSettings(
        TokenCounts.read("k", k).largest, visual_weight, experts, selection_gradient, native_scale
    )
    at_llm_width = layout == "llm_width"
    fusion = FlashGlobalFusion(
        llm_width if at_llm_width else vision_width,
        inner_width=vision_width,
        state_size=state_size,
        # Mamba's rule, applied to C in both layouts.
        dt_rank=math.ceil(vision_width / 16),
        window=window,
        local=local,
        scan=scan,
        shared_projections=not at_llm_width,
        # An affine LayerNorm would add 10,240 parameters at D = 5120 and miss the paper's 37.08 M.
        affine_norm=not at_llm_width,
        scan_backend=scan_backend,
    )
    return MeteorProjector(
        nn.Linear(vision_width, llm_width) if at_llm_width else nn.Identity(),
        fusion,
        nn.Identity() if at_llm_width else two_layer_mlp(vision_width, llm_width),
        vision_width=vision_width,
        selection=selection,
    )
