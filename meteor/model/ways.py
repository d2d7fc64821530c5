"""Ways in which a language model can compute a batch of samples, and the choice among them."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from meteor.errors import SettingsError
from meteor.model.attention import VARLEN, check_varlen, suits_varlen

# The fastest first.
_PREFERRED = (VARLEN, "sdpa", "eager")


@dataclass(frozen=True)
class Ways:
    """Arrangements of an architecture's samples: for each attention why it does not work, or None if it works.

    Attributes:
        architecture: class of the language model, for messages.
        packed: several samples per row.
        single: one sample per row, padded.
        answering: reason why prompts of different lengths cannot be answered together, or None.
        problem: reason why the architecture could not be tried, or None. Then ``packed`` is empty, and ``single`` is what
            the architecture declares.
    """

    architecture: str
    packed: dict[str, str | None] = field(default_factory=dict)
    single: dict[str, str | None] = field(default_factory=dict)
    answering: str | None = None
    problem: str | None = None

    @property
    def packs(self) -> bool:
        """Whether some attention computes several samples per row."""
        return None in self.packed.values()

    @property
    def trains(self) -> bool:
        """Whether any arrangement works."""
        return self.packs or None in self.single.values()


@dataclass(frozen=True)
class Way:
    """Chosen way to compute a batch.

    Attributes:
        attention: attention of the language model in training.
        batching: layout of a batch.
        text: sentence about the choice and its reason.
    """

    attention: str
    batching: Literal["padded", "grouped", "packed"]
    text: str


def choose_way(
    ways: Ways,
    *,
    attention: Literal["auto", "eager", "sdpa", "varlen"],
    batching: Literal["auto", "padded", "grouped", "packed"],
    device: torch.device,
    dtype: torch.dtype,
) -> Way:
    """Choose how a language model is trained.

    ``auto`` batching depends on the architecture alone, not on device or attention, so that a run continues with the same
    order of samples on another machine.

    Args:
        ways: result of `meteor.model.trial.find_ways`.
        attention: setting ``llm.attention``.
        batching: setting ``batching`` of the stage.
        device: device of a training worker.
        dtype: type of the language model's weights.

    Raises:
        SettingsError: the attention or the batching does not work with this language model; the message says why.
    """
    if attention == VARLEN:
        check_varlen(device, dtype)
    if batching == "auto":
        batching = "packed" if ways.packs else "grouped"
    fast = [name for name in _PREFERRED if name != VARLEN or suits_varlen(device, dtype)]
    wanted = fast if attention == "auto" else [attention]
    reasons = {name: _reason(ways, name, packs=batching == "packed") for name in wanted}
    chosen = next((name for name, reason in reasons.items() if reason is None), None)
    if chosen is None:
        raise SettingsError(_refusal(ways, attention, batching, reasons))
    rows = "several samples per row" if batching == "packed" else "one sample per row"
    why = f", because {_why_not_packed(ways)}" if batching != "packed" and not ways.packs else ""
    return Way(chosen, batching, f"{ways.architecture}: {rows} ({batching}), attention {chosen}{why}")


def _reason(ways: Ways, attention: str, *, packs: bool) -> str | None:
    # Without a trial only what was asked for is known; the workers try the model itself before the first step.
    if ways.problem is not None:
        return ways.problem if attention == VARLEN else ways.single[attention]
    # `varlen` computes all samples in one row, whatever the batch looks like.
    return ways.packed[attention] if packs or attention == VARLEN else ways.single[attention]


def _why_not_packed(ways: Ways) -> str:
    reasons = [reason for reason in ways.packed.values() if reason]
    leaks = [reason for reason in reasons if "neighbour" in reason]
    return ways.problem or (leaks or reasons)[0]


def _refusal(ways: Ways, attention: str, batching: str, reasons: dict[str, str | None]) -> str:
    if not ways.trains:
        return f"llm.path: {ways.architecture} cannot be trained: {next(iter(reasons.values()))}"
    if batching == "packed" and not ways.packs:
        return f"batching=packed does not work with {ways.architecture}: {_why_not_packed(ways)}. Set batching=grouped, or auto"
    return (
        f"llm.attention={attention} with batching={batching} does not work with {ways.architecture}: "
        f"{next(iter(reasons.values()))}. Set llm.attention=auto"
    )
