"""The order of training, as arithmetic: which samples make which global batch, and which rank takes which of them.

Nothing here depends on a random generator of a library, so a run resumed elsewhere sees the same batches; nothing
depends on the number of workers, so a run resumed on another number of workers does too.
"""

import hashlib
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

# Samples of similar length are looked for among so many global batches, or a quarter of a small epoch (transformers'
# numbers): sorting the whole epoch by length would give the same batches every epoch.
_GLOBAL_BATCHES_PER_RUN = 50
_RUNS_PER_EPOCH = 4

# Rows of one forward pass, each the positions of its samples; empty where a worker has nothing left.
MicroBatch = list[list[int]]


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Optimiser steps an epoch takes; the last batch may be short."""
    return -(-num_samples // global_batch_size)


@dataclass(frozen=True)
class Part:
    """Samples of a mixture that have a weight of their own, one after the other in the table.

    Attributes:
        num_samples: how many.
        weight: passes over them in an epoch.
    """

    num_samples: int
    weight: float = 1.0

    def seen_before(self, epoch: int) -> int:
        """Samples that the epochs before this one take, repeats counted; rounded down, so that no error adds up."""
        return int(epoch * self.num_samples * Fraction(str(self.weight)))


def epoch_length(parts: Sequence[Part], epoch: int) -> int:
    """Samples of an epoch, repeats counted; with weights that are not whole it may differ by one a part."""
    return sum(part.seen_before(epoch + 1) - part.seen_before(epoch) for part in parts)


def epoch_samples(parts: Sequence[Part], *, seed: int, epoch: int, index_digest: str) -> list[int]:
    """Which samples an epoch takes, and how often.

    Each part is gone through in rounds, every round a permutation of its own; an epoch takes the next ``weight`` rounds, and
    the epoch after it goes on from there. So a whole weight takes every sample equally often, and of any other no sample is
    ever seen twice more often than another.

    Args:
        parts: of the table, in its order.
        seed: of the run.
        epoch: counted from 0.
        index_digest: of the dataset index.

    Returns:
        Positions in the table, ascending, repeated as often as the sample comes.
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
    """Some places of a permutation."""
    if taken == slice(0, part.num_samples):
        return list(range(part.num_samples))  # all of them: their order does not matter
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
    """The global batches of an epoch.

    Every sample comes once. The samples are shuffled; with ``group`` they are then sorted by length inside runs of 50
    global batches (of a quarter of the epoch, if that is less), cut into batches, and the batches are shuffled. A short
    last batch is taken from the shuffled samples before grouping, so no length is favoured in it.

    Args:
        lengths: length of each sample: text tokens + 144 a sub-image, whatever the projector.
        global_batch_size: samples in a batch, at least 1.
        seed: of the run.
        epoch: counted from 0.
        index_digest: of the dataset index, so that other data have another order.
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
    """Put the samples of a global batch into rows, several to a row.

    As few rows as the first-fit rule for decreasing lengths needs; then, the number rounded up to ``multiple``, the same
    samples spread evenly over the rows, so that no worker waits for one whose rows are fuller.

    Args:
        batch: positions of samples.
        lengths: tokens of every sample of the epoch, visual ones included.
        capacity: most tokens in a row. A longer sample has a row to itself.
        multiple: rows that are computed together by all workers; more rows than that rounds up to are not made.

    Returns:
        Rows of positions, none empty, each in the order of the batch.
    """
    places = sorted(range(len(batch)), key=lambda place: (-lengths[batch[place]], place))
    full = _first_fit(batch, lengths, places, capacity)
    num_rows = min(-(-len(full) // multiple) * multiple, len(batch))
    rows = _spread(batch, lengths, places, num_rows)
    if any(len(row) > 1 and sum(lengths[batch[place]] for place in row) > capacity for row in rows):
        rows = full
    return [[batch[place] for place in sorted(row)] for row in rows]


def _first_fit(batch: Sequence[int], lengths: Sequence[int], places: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for place in places:
        length = lengths[batch[place]]
        row = next((i for i, left in enumerate(room) if length <= left), None)
        if row is None:
            rows.append([place])
            room.append(capacity - length)
        else:
            rows[row].append(place)
            room[row] -= length
    return rows


def _spread(batch: Sequence[int], lengths: Sequence[int], places: Sequence[int], num_rows: int) -> list[list[int]]:
    """The longest sample goes where least is so far: the greedy rule for even sums."""
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

    Every rank takes the same number of micro-steps, as collective operations need; where rows run out, micro-steps are
    empty lists, the last ones first. Which samples a batch has does not depend on this.

    Args:
        rows: positions of samples, those of one row together; rows of one where nothing is packed.
        lengths: of every sample of the epoch.
        world_size: ranks.
        micro_batch_size: most rows in a micro-step.

    Returns:
        For each rank its micro-steps, each a list of rows in the given order.
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
    # Ranks wait for each other at every micro-step, so those with similar sums run together; every other step is dealt
    # backwards, or rank 0 would always get the longest.
    by_total = sorted(range(len(slots)), key=lambda slot: (not slots[slot], -totals[slot], slot))
    ranks: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    for step in range(num_steps):
        dealt = by_total[step * world_size : (step + 1) * world_size]
        for rank, slot in enumerate(dealt if step % 2 == 0 else reversed(dealt)):
            ranks[rank].append([list(rows[row]) for row in sorted(slots[slot])])
    return ranks


def _random_keys(context: str) -> Callable[[str, int], bytes]:
    """A function that gives each (purpose, number) its own 128 random-looking bits, the same everywhere."""
    started = hashlib.blake2b(context.encode(), digest_size=16)

    def key(purpose: str, number: int) -> bytes:
        state = started.copy()
        state.update(f"/{purpose}/{number}".encode())
        return state.digest()

    return key
