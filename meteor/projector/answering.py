"""Settings of the token selection that may change between training and answering, without other weights.

The weight of the experts is set in the projector. The number of tokens is not: the prompt's slots tell it to each forward pass.
"""

from dataclasses import dataclass, replace
from typing import Literal

from meteor.errors import SettingsError
from meteor.projector.meteor import MeteorProjector
from meteor.projector.output import Projector


@dataclass(frozen=True)
class AnswerSelection:
    """Changes of the token selection when answering; None leaves the value of training.

    Attributes:
        k: most tokens per sub-image.
        visual_weight: weight of the class token's attention against the similarity to the instruction, 0 to 1.
        sub_images: ``global`` to answer from the global view alone, ``all`` for all sub-images.
    """

    k: int | None = None
    visual_weight: float | None = None
    sub_images: Literal["all", "global"] | None = None


AS_TRAINED = AnswerSelection()


def set_selection(projector: Projector, changes: AnswerSelection) -> None:
    """Set the weight of the experts of a trained projector; the weight of training is in its ``settings``.

    Raises:
        SettingsError: the projector has no such weight, or the value is out of range.
    """
    # A single expert has no weight against another.
    has_weight = isinstance(projector, MeteorProjector) and projector.selection.experts == "visual_native"
    if changes.visual_weight is not None and not has_weight:
        raise SettingsError(
            f"evaluate.visual_weight={changes.visual_weight}: projector {projector.settings['name']!r} has no visual_weight "
            "that may change after training"
        )
    if isinstance(projector, MeteorProjector) and has_weight:
        trained = projector.settings["visual_weight"]
        weight = trained if changes.visual_weight is None else changes.visual_weight
        projector.selection = replace(projector.selection, visual_weight=weight)
