"""Trial of the model itself before its first step: no sample's loss depends on its neighbours in a batch."""

from collections.abc import Callable, Sequence

import torch

from meteor.constants import IGNORE_INDEX
from meteor.data.collate import Batch
from meteor.errors import SettingsError
from meteor.text.tokens import TokenisedSample
from meteor.train.protocol import Engine

Rows = list[list[tuple[TokenisedSample, list[object]]]]
_LENGTH, _LONGER = 16, 23
# Differences of a mean loss that rounding explains, as shares of the loss. Models with experts may choose others for a
# token if the row around it changes its rounding.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
# Share of the effect of a sample's own first half above which a neighbour's effect is a leak.
_LEAK = 0.1


def check_rows(
    engine: Engine, collate: Callable[[Rows], Batch], *, packs: bool, vocab_size: int, dtype: torch.dtype
) -> None:
    """Compare a sample's loss alone, with a neighbour, and with another neighbour; a collective operation.

    The driver has tried a tiny model of the architecture. Here the model itself is tried, with its weights, kernels and
    device.

    Args:
        engine: engine with the model.
        collate: function that makes a batch from rows of samples.
        packs: whether the neighbour shares the sample's row, or only its batch.
        vocab_size: number of token ids.
        dtype: type of the weights.

    Raises:
        SettingsError: the loss depends on the neighbour.
    """
    generator = torch.Generator().manual_seed(0)

    def words(length: int) -> list[int]:
        return torch.randint(vocab_size // 2, (length,), generator=generator).tolist()

    half = _LENGTH // 2
    own, others, end = words(half), words(half), words(_LENGTH - half)
    labels = [IGNORE_INDEX] * half + end
    sample, changed = (TokenisedSample(start + end, labels) for start in (own, others))
    neighbours = [TokenisedSample(words(_LONGER), [IGNORE_INDEX] * _LONGER) for _ in range(2)]

    def loss(*samples: TokenisedSample) -> float:
        rows: Rows = [[(sample, []) for sample in samples]] if packs else [[(sample, [])] for sample in samples]
        return float(engine.evaluate(collate(rows).to(engine.device).as_inputs()).loss)

    alone = loss(sample)
    found = [loss(neighbour, sample) for neighbour in neighbours]
    allowed = _LEAK * abs(loss(changed) - alone) + _ROUNDING[dtype] * abs(alone)
    _raise_if_off(alone, found, allowed, packs=packs)


def _raise_if_off(alone: float, found: Sequence[float], allowed: float, *, packs: bool) -> None:
    off = max(abs(value - alone) for value in found)
    if off <= allowed:
        return
    where = "in its row" if packs else "in its batch"
    remedy = "Set batching=grouped, or llm.attention=sdpa or eager" if packs else "Set llm.attention=eager"
    raise SettingsError(
        f"a sample's loss depends on its neighbour {where}: {alone:.4f} alone, {found[0]:.4f} and {found[1]:.4f} with two "
        f"others, and rounding explains differences of {allowed:.2g}. {remedy}"
    )
