"""The order of training as arithmetic: the samples of each global batch, and their division among ranks.

The order depends on no library's random generator, so a run that resumes elsewhere sees the same batches. The batches do
not depend on the number of workers either, so a run can resume on another number of workers.
"""

import hashlib
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from meteor.image.elastic import TokenCounts

# Samples are sorted by length within this many global batches, or within a quarter of a small epoch (both numbers are
# those of transformers): sorting the whole epoch by length would give the same batches every epoch.
_GLOBAL_BATCHES_PER_RUN = 50
_RUNS_PER_EPOCH = 4

# Rows of one forward pass, each a list of its samples' positions; empty if a worker has no samples left.
MicroBatch = list[list[int]]
# A micro batch, and the most visual tokens per sub-image in its step; None for the projector's largest number.
CountedBatch = tuple[MicroBatch, int | None]


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Return the number of optimiser steps per epoch; the last batch may be short."""
    return -(-num_samples // global_batch_size)


@dataclass(frozen=True)
class Part:
    """Consecutive samples of a table that share a weight in the mixture.

    Attributes:
        num_samples: number of samples.
        weight: passes over these samples per epoch.
    """

    num_samples: int
    weight: float = 1.0

    def seen_before(self, epoch: int) -> int:
        """Return the number of samples, with repeats, that all epochs before ``epoch`` take together."""
        # Rounded once from the exact product, so that no error adds up over epochs. The text of a float avoids its binary
        # digits: 0.1 is 1/10 here.
        return int(epoch * self.num_samples * Fraction(str(self.weight)))


def epoch_length(parts: Sequence[Part], epoch: int) -> int:
    """Return the samples of an epoch, with repeats; if weights are not whole, epochs may differ by one per part."""
    return sum(part.seen_before(epoch + 1) - part.seen_before(epoch) for part in parts)


def epoch_samples(parts: Sequence[Part], *, seed: int, epoch: int, index_digest: str) -> list[int]:
    """Choose the samples of an epoch, with repeats.

    Each part is visited in rounds, and every round is a new permutation. An epoch takes the next ``weight`` rounds, and the
    following epoch continues from there. With a whole weight every sample comes equally often. With any other weight the
    counts of two samples, summed over all epochs so far, differ by at most one.

    Args:
        parts: parts of the table in its order.
        seed: the run's seed.
        epoch: number of the epoch, from 0.
        index_digest: digest of the dataset index.

    Returns:
        Positions in the table, ascending; a sample that comes several times is repeated.
    """
    samples: list[int] = []
    first = 0
    for number, part in enumerate(parts):
        begin, end = part.seen_before(epoch), part.seen_before(epoch + 1)
        if part.num_samples:
            for round_ in range(begin // part.num_samples, -(-end // part.num_samples)):
                start = round_ * part.num_samples
                taken = slice(max(begin - start, 0), min(end - start, part.num_samples))
                samples += [first + i for i in _round(part, f"{seed}/{number}/{round_}/{index_digest}", taken)]
        first += part.num_samples
    return sorted(samples)


def _round(part: Part, context: str, taken: slice) -> list[int]:
    """Return the part of a permutation that ``taken`` names."""
    if taken == slice(0, part.num_samples):
        # A complete round needs no sorting, as the order of an epoch's samples does not matter here.
        return list(range(part.num_samples))
    key = _random_keys(context)
    return sorted(range(part.num_samples), key=lambda i: key("round", i))[taken]


def epoch_order(
    lengths: Sequence[int],
    *,
    global_batch_size: int,
    seed: int,
    epoch: int,
    index_digest: str,
    group: bool = True,
) -> list[list[int]]:
    """Arrange the samples of an epoch in global batches; every sample comes once.

    The samples are shuffled. With ``group`` they are then sorted by length within runs of 50 global batches (or a quarter
    of the epoch, if that is less) and cut into batches, and the batches are shuffled. A short last batch is taken from the
    shuffled samples before grouping, so that it favours no length.

    Args:
        lengths: length of each sample: text tokens + 144 per sub-image, whatever the projector.
        global_batch_size: samples per batch, at least 1.
        seed: the run's seed.
        epoch: number of the epoch, from 0.
        index_digest: digest of the dataset index, so that other data have another order.
        group: put samples of similar length together.

    Returns:
        Positions of samples, batch by batch; the last batch may be short.
    """
    key = _random_keys(f"{seed}/{epoch}/{index_digest}")
    shuffled = sorted(range(len(lengths)), key=lambda sample: key("sample", sample))
    num_full = len(lengths) // global_batch_size * global_batch_size
    full, remainder = shuffled[:num_full], shuffled[num_full:]
    if group:
        num_batches = num_full // global_batch_size
        run = min(_GLOBAL_BATCHES_PER_RUN, max(1, num_batches // _RUNS_PER_EPOCH)) * global_batch_size
        full = [
            sample
            for start in range(0, num_full, run)
            for sample in sorted(full[start : start + run], key=lengths.__getitem__, reverse=True)
        ]
    batches = [full[start : start + global_batch_size] for start in range(0, num_full, global_batch_size)]
    if group:
        order = sorted(range(len(batches)), key=lambda batch: key("batch", batch))
        batches = [batches[batch] for batch in order]
    return [*batches, remainder] if remainder else batches


def pack(batch: Sequence[int], lengths: Sequence[int], *, capacity: int, multiple: int = 1) -> list[list[int]]:
    """Pack the samples of a global batch into rows of several samples each.

    The number of rows is that of the first-fit rule for decreasing lengths, rounded up to ``multiple``. The samples are then
    spread evenly over the rows, so that no worker waits for another with fuller rows.

    Args:
        batch: positions of samples.
        lengths: tokens of every sample of the epoch, including visual tokens.
        capacity: most tokens per row; a longer sample has a row to itself.
        multiple: rows that all workers compute together; the number of rows is rounded up to it.

    Returns:
        Rows of positions, none empty, each in the order of the batch.
    """
    places = sorted(range(len(batch)), key=lambda place: (-lengths[batch[place]], place))
    full = _first_fit(batch, lengths, places, capacity)
    num_rows = min(-(-len(full) // multiple) * multiple, len(batch))
    rows = _spread(batch, lengths, places, num_rows)
    # The even spread ignores the capacity; if it exceeds it, the first-fit rows stay.
    if any(len(row) > 1 and sum(lengths[batch[place]] for place in row) > capacity for row in rows):
        rows = full
    return [[batch[place] for place in sorted(row)] for row in rows]


def _first_fit(batch: Sequence[int], lengths: Sequence[int], places: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    num_free: list[int] = []
    for place in places:
        length = lengths[batch[place]]
        row = next((i for i, free in enumerate(num_free) if length <= free), None)
        if row is None:
            rows.append([place])
            num_free.append(capacity - length)
        else:
            rows[row].append(place)
            num_free[row] -= length
    return rows


def _spread(batch: Sequence[int], lengths: Sequence[int], places: Sequence[int], num_rows: int) -> list[list[int]]:
    """Put each sample, the longest first, into the row with the fewest tokens: the greedy rule for even sums."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    emptiest = [(0, row) for row in range(num_rows)]
    for place in places:
        total, row = heapq.heappop(emptiest)
        rows[row].append(place)
        heapq.heappush(emptiest, (total + lengths[batch[place]], row))
    return rows


def assign(
    rows: Sequence[Sequence[int]], lengths: Sequence[int], *, world_size: int, micro_batch_size: int
) -> list[list[MicroBatch]]:
    """Divide the rows of a global batch among ranks and micro-steps, evenly by length.

    Every rank takes the same number of micro-steps, because collective operations need it. If there are too few rows, the
    last micro-steps are empty lists. The samples of a batch do not depend on this division.

    Args:
        rows: positions of the samples of each row; rows of one sample when nothing is packed.
        lengths: length of every sample of the epoch.
        world_size: number of ranks.
        micro_batch_size: most rows per micro-step.

    Returns:
        The micro-steps of each rank, each a list of rows in the given order.
    """
    row_lengths = [sum(lengths[position] for position in row) for row in rows]
    num_steps = max(1, -(-len(rows) // (world_size * micro_batch_size)))
    slots: list[list[int]] = [[] for _ in range(num_steps * world_size)]
    totals = [0] * len(slots)
    emptiest = [(0, slot) for slot in range(len(slots))]
    for row in sorted(range(len(rows)), key=lambda row: (-row_lengths[row], row)):
        total, slot = heapq.heappop(emptiest)
        slots[slot].append(row)
        totals[slot] = total + row_lengths[row]
        if len(slots[slot]) < micro_batch_size:
            heapq.heappush(emptiest, (totals[slot], slot))
    # Ranks wait for each other at every micro-step, so micro-batches with similar sums run together. Every other step is
    # dealt backwards, because rank 0 would otherwise always get the longest.
    by_total = sorted(range(len(slots)), key=lambda slot: (not slots[slot], -totals[slot], slot))
    ranks: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    for step in range(num_steps):
        dealt = by_total[step * world_size : (step + 1) * world_size]
        for rank, slot in enumerate(dealt if step % 2 == 0 else reversed(dealt)):
            ranks[rank].append([list(rows[row]) for row in sorted(slots[slot])])
    return ranks


def draw_count(counts: TokenCounts, *, seed: int, step: int) -> int:
    """Draw the number of visual tokens per sub-image of an optimiser step.

    Args:
        counts: numbers to draw from.
        seed: the run's seed.
        step: number of the step in the whole stage, from 0.
    """
    return counts.pick(int.from_bytes(_random_keys(f"{seed}")("k", step), "big"))


def _random_keys(context: str) -> Callable[[str, int], bytes]:
    """Return a function that maps (purpose, number) to 128 random-looking bits, which are equal on every machine."""
    # Copies of a hash that has read the context cost less than hashing it for every sample.
    started = hashlib.blake2b(context.encode(), digest_size=16)

    def key(purpose: str, number: int) -> bytes:
        state = started.copy()
        state.update(f"/{purpose}/{number}".encode())
        return state.digest()

    return key
