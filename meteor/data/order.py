"""The order of training, as arithmetic: which samples make which global batch, and which rank takes which of them.

Nothing here depends on a random generator of a library, so a run resumed elsewhere sees the same batches; nothing
depends on the number of workers, so a run resumed on another number of workers does too.
"""

import hashlib
import heapq
from collections.abc import Callable, Sequence

# Samples of similar length are looked for among so many global batches, or a quarter of a small epoch (transformers'
# numbers): sorting the whole epoch by length would give the same batches every epoch.
_GLOBAL_BATCHES_PER_RUN = 50
_RUNS_PER_EPOCH = 4


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Optimiser steps an epoch takes; the last batch may be short."""
    return -(-num_samples // global_batch_size)


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


def assign(
    batch: Sequence[int], lengths: Sequence[int], *, world_size: int, micro_batch_size: int
) -> list[list[list[int]]]:
    """Divide a global batch among ranks and micro-steps, evenly by length.

    Every rank takes the same number of micro-steps, as collective operations need; where samples run out, micro-steps
    are empty lists, the last ones first. Which samples a batch has does not depend on this.

    Args:
        batch: positions of samples.
        lengths: of every sample of the epoch.
        world_size: ranks.
        micro_batch_size: most samples in a micro-step.

    Returns:
        For each rank its micro-steps, each a list of positions in the order of the batch.
    """
    num_steps = max(1, -(-len(batch) // (world_size * micro_batch_size)))
    slots: list[list[int]] = [[] for _ in range(num_steps * world_size)]
    totals = [0] * len(slots)
    # The longest sample goes where least is so far: the greedy rule for even sums.
    emptiest = [(0, slot) for slot in range(len(slots))]
    for place in sorted(range(len(batch)), key=lambda place: (-lengths[batch[place]], place)):
        total, slot = heapq.heappop(emptiest)
        slots[slot].append(place)
        totals[slot] = total + lengths[batch[place]]
        if len(slots[slot]) < micro_batch_size:
            heapq.heappush(emptiest, (totals[slot], slot))
    # Ranks wait for each other at every micro-step, so those with similar sums run together; every other step is dealt
    # backwards, or rank 0 would always get the longest.
    by_total = sorted(range(len(slots)), key=lambda slot: (not slots[slot], -totals[slot], slot))
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    for step in range(num_steps):
        dealt = by_total[step * world_size : (step + 1) * world_size]
        for rank, slot in enumerate(dealt if step % 2 == 0 else reversed(dealt)):
            ranks[rank].append([batch[place] for place in sorted(slots[slot])])
    return ranks


def _random_keys(context: str) -> Callable[[str, int], bytes]:
    """A function that gives each (purpose, number) its own 128 random-looking bits, the same everywhere."""
    started = hashlib.blake2b(context.encode(), digest_size=16)

    def key(purpose: str, number: int) -> bytes:
        state = started.copy()
        state.update(f"/{purpose}/{number}".encode())
        return state.digest()

    return key
