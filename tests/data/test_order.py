import hashlib
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meteor.data.order import Part, assign, epoch_length, epoch_order, epoch_samples, pack, steps_per_epoch


def make_lengths(num_samples, seed=0):
    rng = random.Random(seed)
    return [rng.choice([rng.randrange(30, 300), rng.randrange(700, 1300)]) for _ in range(num_samples)]


def order(lengths, *, global_batch_size=8, seed=0, epoch=0, index_digest="d", group=True):
    return epoch_order(
        lengths, global_batch_size=global_batch_size, seed=seed, epoch=epoch, index_digest=index_digest, group=group
    )


def padding_share(batches, lengths):
    padded = sum(max(lengths[sample] for sample in batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / padded


@pytest.mark.parametrize("num_samples", [0, 1, 7, 8, 9, 1000, 1003])
@pytest.mark.parametrize("group", [True, False])
def test_every_sample_comes_exactly_once_and_only_the_last_batch_is_short(num_samples, group):
    batches = order(make_lengths(num_samples), group=group)
    assert sorted(sample for batch in batches for sample in batch) == list(range(num_samples))
    assert len(batches) == steps_per_epoch(num_samples, 8)
    assert [len(batch) for batch in batches[:-1]] == [8] * (len(batches) - 1)


def test_the_order_is_pinned_down():
    """The rule of the docstring, with hashlib alone: an order that changes breaks the resuming of older runs."""

    def key(purpose, number):
        return hashlib.blake2b(f"3/1/d/{purpose}/{number}".encode(), digest_size=16).digest()

    lengths = [50, 10, 40, 20, 30, 60, 70, 55, 15, 45, 25, 35, 65, 75, 5, 80, 1]
    shuffled = sorted(range(17), key=lambda sample: key("sample", sample))
    # 8 batches of 2: runs of two batches.
    runs = [sorted(shuffled[start : start + 4], key=lambda sample: -lengths[sample]) for start in (0, 4, 8, 12)]
    batches = [half for run in runs for half in (run[:2], run[2:])]
    expected = [batches[batch] for batch in sorted(range(8), key=lambda batch: key("batch", batch))]
    assert order(lengths, global_batch_size=2, seed=3, epoch=1) == [*expected, shuffled[16:]]


@pytest.mark.parametrize("group", [True, False])
def test_seed_epoch_and_digest_each_change_the_order(group):
    lengths = make_lengths(200)
    orders = [
        order(lengths, group=group, **change) for change in ({}, {"seed": 1}, {"epoch": 1}, {"index_digest": "e"})
    ]
    assert all(first != second for n, first in enumerate(orders) for second in orders[:n])
    assert order(lengths, group=group) == orders[0]
    compositions = [{frozenset(batch) for batch in batches} for batches in orders]
    assert all(len(first & second) < 5 for n, first in enumerate(compositions) for second in compositions[:n])


def test_grouping_saves_padding():
    lengths = make_lengths(4000)
    grouped, ungrouped = (padding_share(order(lengths, group=group), lengths) for group in (True, False))
    assert ungrouped > 0.4
    assert grouped < 0.05


def test_batches_of_a_length_are_spread_over_the_epoch():
    lengths = make_lengths(4000)
    means = [sum(lengths[sample] for sample in batch) / 8 for batch in order(lengths)]
    half = len(means) // 2
    assert sum(means[:half]) == pytest.approx(sum(means[half:]), rel=0.1)


def test_the_short_last_batch_favours_no_length():
    lengths = list(range(1003))
    remainders = [order(lengths, epoch=epoch)[-1] for epoch in range(200)]
    assert {len(batch) for batch in remainders} == {3}
    mean = sum(lengths[sample] for batch in remainders for sample in batch) / 600
    assert mean == pytest.approx(501, abs=50)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8, 31, 128])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_a_batch_is_divided_whole_with_equal_steps_for_every_rank(batch_size, world_size, micro_batch_size):
    lengths = make_lengths(batch_size + 10)
    batch = list(range(batch_size + 9, 9, -1))
    rows = [[sample] for sample in batch]
    ranks = assign(rows, lengths, world_size=world_size, micro_batch_size=micro_batch_size)
    ranks = [[[sample for [sample] in step] for step in rank] for rank in ranks]
    steps = [step for rank in ranks for step in rank]
    assert sorted(sample for step in steps for sample in step) == sorted(batch)
    assert len(ranks) == world_size
    assert {len(rank) for rank in ranks} == {-(-batch_size // (world_size * micro_batch_size))}
    assert max(map(len, steps)) <= micro_batch_size
    assert all(step for rank in ranks for step in rank[:-1])
    assert all(sorted(step, key=batch.index) == step for step in steps)
    again = assign(rows, lengths, world_size=world_size, micro_batch_size=micro_batch_size)
    assert [[[[sample] for sample in step] for step in rank] for rank in ranks] == again


def test_ranks_and_steps_carry_even_lengths():
    lengths = make_lengths(4000)
    for batch in order(lengths, global_batch_size=128)[:-1]:
        ranks = assign([[sample] for sample in batch], lengths, world_size=4, micro_batch_size=4)
        totals = [[sum(lengths[sample] for [sample] in step) for step in rank] for rank in ranks]
        per_rank = [sum(rank) for rank in totals]
        assert max(per_rank) < 1.05 * min(per_rank)
        for step in zip(*totals, strict=True):
            assert max(step) < 1.2 * min(step)


def test_a_batch_divided_by_hand():
    lengths = [9, 1, 8, 2, 7]
    # Slots of at most 2: 9 | 8 | 7, then 2 joins 7, 1 joins 8: {0}, {2, 1}, {4, 3} and one slot left for nobody.
    rows = [[0], [1], [2], [3], [4]]
    assert assign(rows, lengths, world_size=3, micro_batch_size=2) == [[[[0]]], [[[1], [2]]], [[[3], [4]]]]
    # A row counts as one, with the length of all its samples: 10 | 9 and 8.
    assert assign([[0, 1], [4, 3], [2]], lengths, world_size=2, micro_batch_size=2) == [[[[4, 3], [2]]], [[[0, 1]]]]
    assert assign([[1]], lengths, world_size=2, micro_batch_size=2) == [[[[1]]], [[]]]
    assert assign([], lengths, world_size=2, micro_batch_size=2) == [[[]], [[]]]


def test_rows_packed_by_hand():
    lengths = [5, 9, 4, 1, 6]
    # First fit for decreasing lengths: 9 + 1 | 6 + 4 | 5. Spread evenly: 9 | 6 + 1 | 5 + 4.
    assert pack([0, 1, 2, 3, 4], lengths, capacity=10) == [[1], [3, 4], [0, 2]]
    # With room for four rows at once the last sample has one of its own.
    assert pack([0, 1, 2, 3, 4], lengths, capacity=10, multiple=4) == [[1], [4], [0], [2, 3]]
    assert pack([3, 2], lengths, capacity=10, multiple=4) == [[2], [3]]
    assert pack([], lengths, capacity=10, multiple=4) == []
    # 4 + 4 | 3 + 3 + 2 fits; spread evenly it would be 4 + 3 + 2 | 4 + 3, and does not.
    assert pack([0, 1, 2, 3, 4], [4, 4, 3, 3, 2], capacity=8) == [[0, 1], [2, 3, 4]]
    # Longer than a row: alone.
    assert pack([0, 1, 2], [12, 3, 4], capacity=10) == [[0], [1, 2]]


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_rows_hold_every_sample_once_and_are_nearly_full(multiple):
    lengths = make_lengths(4000)
    for batch in order(lengths, global_batch_size=128, group=False)[:-1]:
        rows = pack(batch, lengths, capacity=2048, multiple=multiple)
        assert sorted(sample for row in rows for sample in row) == sorted(batch)
        totals = [sum(lengths[sample] for sample in row) for row in rows]
        assert max(totals) <= 2048
        fewest = -(-sum(totals) // 2048)
        assert fewest <= len(rows) <= max(fewest + 1, -(-(fewest + 1) // multiple) * multiple)


def taken(parts, epoch, *, seed=0, index_digest="d"):
    return epoch_samples(parts, seed=seed, epoch=epoch, index_digest=index_digest)


def test_a_weight_of_one_takes_every_sample_once_whatever_the_epoch():
    assert [taken([Part(3), Part(0), Part(2)], epoch) for epoch in range(3)] == [[0, 1, 2, 3, 4]] * 3


PARTS = st.lists(
    st.builds(Part, st.integers(0, 40), st.integers(1, 400).map(lambda hundredths: hundredths / 100)),
    min_size=1,
    max_size=3,
)


@given(PARTS, st.integers(1, 8))
def test_after_any_epoch_every_sample_of_a_part_has_come_equally_often_but_for_one(parts, num_epochs):
    counts, first = Counter(), 0
    for epoch in range(num_epochs):
        samples = taken(parts, epoch)
        assert samples == sorted(samples)
        assert len(samples) == epoch_length(parts, epoch)
        counts.update(samples)
    for part in parts:
        own = [counts[first + i] for i in range(part.num_samples)]
        first += part.num_samples
        assert sum(own) == part.num_samples * num_epochs * Fraction(str(part.weight)) // 1
        assert max(own, default=0) - min(own, default=0) <= 1
    assert counts.total() == sum(epoch_length(parts, epoch) for epoch in range(num_epochs))


def test_shares_are_dealt_from_one_round_after_the_other():
    """The rule of the docstring, with hashlib alone: an order that changes breaks the resuming of older runs."""

    def deal(round_):
        def key(i):
            return hashlib.blake2b(f"3/1/{round_}/d/round/{i}".encode(), digest_size=16).digest()

        return [5 + i for i in sorted(range(10), key=key)]

    stream = [sample for round_ in range(4) for sample in deal(round_)]
    parts = [Part(5, 1), Part(10, 0.75)]
    for epoch, (begin, end) in enumerate([(0, 7), (7, 15), (15, 22), (22, 30)]):
        own = [sample for sample in taken(parts, epoch, seed=3) if sample >= 5]
        assert own == sorted(stream[begin:end])
    assert taken([Part(10, 0.5)], 0, seed=1) != taken([Part(10, 0.5)], 0, seed=2)
