"""Table of projectors by name, and the function that builds a projector from settings."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from meteor.errors import SettingsError
from meteor.image.elastic import check_counts
from meteor.projector.c_abstractor import CAbstractor
from meteor.projector.focus import Focus
from meteor.projector.ldpv2 import LDPv2
from meteor.projector.llava_mini import LLaVAMini
from meteor.projector.meteor import build_meteor
from meteor.projector.mlp import MLPProjector
from meteor.projector.output import Projector
from meteor.projector.plain import AvgPool, GlobalView, PixelShuffle
from meteor.projector.prumerge import PruMergePlus
from meteor.projector.resampler import Resampler
from meteor.projector.tokenpacker import TokenPacker
from meteor.projector.visionzip import VisionZip
from meteor.projector.visual_topk import VisualTopK

# Each entry takes (vision_width, llm_width, *, settings with defaults); its keyword-only arguments are the valid settings.
PROJECTORS: dict[str, Callable[..., Projector]] = {
    "mlp": MLPProjector,
    "global_view": GlobalView,
    "avg_pool": AvgPool,
    "pixel_shuffle": PixelShuffle,
    "ldpv2": LDPv2,
    "resampler": Resampler,
    "tokenpacker": TokenPacker,
    "c_abstractor": CAbstractor,
    "visual_topk": VisualTopK,
    "visionzip": VisionZip,
    "prumerge_plus": PruMergePlus,
    "llava_mini": LLaVAMini,
    "focus": Focus,
    "meteor": partial(build_meteor, "mlp_after_selection"),
    "meteor_37m": partial(build_meteor, "llm_width"),
}


def build_projector(name: str, *, vision_width: int, llm_width: int, **settings: Any) -> Projector:
    """Build a projector by name.

    Args:
        name: key of `PROJECTORS`.
        vision_width: width of the cached features, C.
        llm_width: width of the LLM's embeddings, D.
        **settings: settings of the projector; omitted settings take their defaults.

    Returns:
        The module; its ``settings`` hold the name, both widths and every setting, so that
        ``build_projector(**projector.settings)`` makes an equal module.

    Raises:
        SettingsError: the name or a setting is unknown, or a value is out of range.
    """
    if name not in PROJECTORS:
        raise SettingsError(f"There is no projector {name!r}; choose one of: {', '.join(PROJECTORS)}.")
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(PROJECTORS[name]).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    unknown = sorted(settings.keys() - defaults.keys())
    if unknown:
        allowed = f"its settings are: {', '.join(defaults)}" if defaults else "it has no settings"
        raise SettingsError(f"Projector {name!r} does not know {', '.join(map(repr, unknown))}; {allowed}.")
    check_counts(name, settings)
    # Settings are stored as JSON and read back, which turns tuples into lists: use lists from the start.
    resolved = {
        key: list(value) if isinstance(value, tuple) else value for key, value in {**defaults, **settings}.items()
    }
    projector = PROJECTORS[name](vision_width, llm_width, **resolved)
    projector.settings = {"name": name, "vision_width": vision_width, "llm_width": llm_width, **resolved}
    return projector
