"""Settings of the token selection that may change between training and answering, without other weights."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from meteor.errors import SettingsError
from meteor.projector.meteor import MeteorProjector
from meteor.projector.output import Projector
from meteor.projector.visual_topk import VisualTopK


@dataclass(frozen=True)
class AnswerSelection:
    """Changes of the token selection when answering; None leaves the value of training.

    Attributes:
        k: most tokens kept per sub-image.
        visual_weight: weight of the class token's attention against the similarity to the instruction, 0 to 1.
        sub_images: ``global`` to answer from the global view alone, ``all`` for all sub-images.
    """

    k: int | None = None
    visual_weight: float | None = None
    sub_images: Literal["all", "global"] | None = None


AS_TRAINED = AnswerSelection()


def set_selection(projector: Projector, changes: AnswerSelection) -> None:
    """Set the selection of a trained projector; the values of training are in its ``settings``.

    Raises:
        SettingsError: the projector does not have the setting, or the value is out of range.
    """
    name, trained = projector.settings["name"], projector.settings
    wanted = {key: getattr(changes, key) for key in ("k", "visual_weight") if getattr(changes, key) is not None}
    unknown = sorted(wanted.keys() - _changeable(projector))
    if unknown:
        raise SettingsError(
            f"evaluate.{unknown[0]}={wanted[unknown[0]]}: projector {name!r} has no {unknown[0]} that may change after training"
        )
    values = {key: wanted.get(key, trained[key]) for key in _changeable(projector)}
    if isinstance(projector, MeteorProjector):
        projector.selection = replace(projector.selection, **values)
    elif isinstance(projector, VisualTopK):
        projector.k = values["k"]


def _changeable(projector: Any) -> set[str]:
    if isinstance(projector, MeteorProjector):
        # A single expert has no weight against another.
        return {"k", "visual_weight"} if projector.selection.experts == "visual_native" else {"k"}
    return {"k"} if isinstance(projector, VisualTopK) else set()
