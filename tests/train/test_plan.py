"""The plan of steps, by listing: what each global batch holds, on any workers, for any variant, from any step on."""

import random
from collections import Counter

import pyarrow as pa
import pytest

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.data.order import Part, epoch_length, steps_per_epoch
from meteor.data.table import SAMPLE_SCHEMA, WHOLE, SampleTable
from meteor.data.token_table import TokenTable
from meteor.text.batches import TokenBatch
from meteor.text.tokens import TokenisedSample
from meteor.train.plan import Recipe, StepPlan, first_steps

BATCHINGS = ("padded", "grouped", "packed")
WORLD_SIZES = (1, 2, 3, 4, 8)


def make_table(num_samples=50, *, k=144, tokens_uri=None):
    """Sample i has i % 3 + 1 answer tokens and up to five sub-images of ``k`` tokens."""
    rows, tokens, chance = [], [], random.Random(0)
    for i in range(max(num_samples, 1)):
        num_text, num_sub_images = chance.randint(20, 200), chance.choice([0, 1, 3, 5])
        answer = [20 + j for j in range(i % 3)] + [2]
        images = [f"k{i}"] if num_sub_images else []
        rows.append(
            {
                "sample_id": f"s{i}",
                "token_row": i,
                "max_text_tokens": WHOLE,
                "image_keys": images,
                "num_sub_images": num_sub_images,
                "num_visual_tokens": k * num_sub_images,
                "num_text_tokens": num_text,
                "num_answer_tokens": len(answer),
                "grouping_length": num_text + 144 * num_sub_images,
            }
        )
        ids = [1, *[IMAGE_PLACE] * len(images), *answer]
        tokens.append(TokenisedSample(ids, [IGNORE_INDEX] * (1 + len(images)) + answer))
    batches = [TokenBatch.of(tokens)]
    table = TokenTable.of(batches) if tokens_uri is None else TokenTable.write(tokens_uri, batches)
    return SampleTable(pa.Table.from_pylist(rows, SAMPLE_SCHEMA).slice(0, num_samples), [table])


def make_plan(table=None, **changes):
    settings = {
        "lr": 1e-2,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "epochs": 2,
        "warmup_ratio": 0.2,
        "seed": 0,
        "native_warmup": 0.0,
        "native_weight_full": None,
        "aux_loss_coefficient": 0.0,
        "batching": "packed",
        "max_length": 1024,
        "checkpoint_every_steps": None,
        "checkpoint_every_s": 1e9,
        "keep_checkpoints": 1,
    }
    return StepPlan(make_table() if table is None else table, Recipe(**{**settings, **changes}), "digest of the index")


def listing(plan, world_size, *, start=0):
    """Sample ids of each global batch, as the workers' micro batches hold them."""
    batches = []
    for step in plan.steps(start):
        shares = [plan.micro_steps(step, rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1, "all workers take equally many micro steps"
        batches.append(sorted(plan.sample_ids[i] for share in shares for micro in share for row in micro for i in row))
    return batches


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("global_batch_size", [1, 3, 7, 50, 64])
def test_every_epoch_has_every_sample_once(global_batch_size, batching):
    plan = make_plan(global_batch_size=global_batch_size, batching=batching, epochs=3)
    steps = list(plan.steps())
    assert [step.index for step in steps] == list(range(plan.num_steps))
    assert plan.num_steps == 3 * steps_per_epoch(50, global_batch_size)
    for epoch in range(3):
        of_epoch = [step for step in steps if step.epoch == epoch]
        assert sorted(position for step in of_epoch for position in step.positions) == list(range(50))
        # The remainder is a short last batch: nothing is dropped, nothing comes twice.
        assert [len(step.positions) for step in of_epoch[:-1]] == [global_batch_size] * (len(of_epoch) - 1)
        assert plan.epochs_done(of_epoch[-1]) == epoch + 1


def test_epochs_seeds_and_data_sets_have_orders_of_their_own():
    table = make_table(64)
    plan = make_plan(table)
    orders = [
        [step.positions for step in one.steps()]
        for one in (plan, make_plan(table, seed=1), StepPlan(table, plan._recipe, "x"))
    ]
    orders += [orders[0][:8], orders[0][8:]]
    assert all(one != other for n, one in enumerate(orders) for other in orders[:n])


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_global_batch_has_the_same_samples_on_any_workers_with_any_micro_batch_for_every_variant(batching):
    listings = {
        k: [
            listing(make_plan(make_table(k=k), batching=batching, micro_batch_size=micro_batch_size), world_size)
            for world_size in WORLD_SIZES
            for micro_batch_size in (1, 2, 5)
        ]
        for k in (144, 64, 32, 576)
    }
    expected = listings[144][0]
    assert len(expected) == 14
    assert all(one == expected for of_k in listings.values() for one in of_k)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_resuming_at_any_step_on_any_workers_goes_on_with_the_same_batches(batching):
    plan = make_plan(batching=batching)
    expected = listing(plan, 1)
    for start in range(plan.num_steps + 1):
        for world_size in (1, 2, 3):
            assert listing(plan, world_size, start=start) == expected[start:]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_rows_of_a_micro_batch_are_no_more_and_no_longer_than_allowed(micro_batch_size, batching):
    table = make_table()
    plan = make_plan(table, micro_batch_size=micro_batch_size, batching=batching)
    for step in plan.steps():
        for world_size in WORLD_SIZES:
            shares = [plan.micro_steps(step, rank, world_size) for rank in range(world_size)]
            assert all(len(micro) <= micro_batch_size for share in shares for micro in share)
            rows = [row for share in shares for micro in share for row in micro]
            if batching == "packed":
                assert all(sum(table.lengths[position] for position in row) <= 1024 for row in rows)
            else:
                assert all(len(row) == 1 for row in rows)


def test_packing_takes_fewer_micro_steps():
    table = make_table(64)
    for step in make_plan(table, global_batch_size=16).steps():
        packed, padded = (
            make_plan(table, global_batch_size=16, batching=batching).micro_steps(step, 0, 1)
            for batching in ("packed", "padded")
        )
        assert len(packed) < len(padded)


def test_the_loss_is_divided_by_the_answer_tokens_of_the_global_batch():
    plan = make_plan()
    for step in plan.steps():
        assert plan.num_answer_tokens(step) == sum(position % 3 + 1 for position in step.positions)


def test_an_empty_table_has_no_steps():
    plan = make_plan(make_table(0))
    assert (plan.num_steps, list(plan.steps())) == (0, [])


def make_mixture(weights, sizes, folder=None):
    uris = [folder and f"{folder}/{number}.arrow" for number in range(len(sizes))]
    return SampleTable.mixture(
        [make_table(size, tokens_uri=uri) for size, uri in zip(sizes, uris, strict=True)], weights
    )


def test_a_mixture_takes_each_file_as_often_as_it_weighs(tmp_path):
    make_mixture([2, 0.5, 1], [10, 20, 7], tmp_path).write(str(tmp_path / "samples.parquet"))
    plan = make_plan(SampleTable.read(str(tmp_path / "samples.parquet")), epochs=4, batching="grouped")
    for epoch in range(4):
        taken = Counter(position for step in plan.steps() if step.epoch == epoch for position in step.positions)
        counts = [[taken[position] for position in range(*ends)] for ends in ((0, 10), (10, 30), (30, 37))]
        assert counts[0] == [2] * 10
        assert sorted(counts[1]) == [0] * 10 + [1] * 10
        assert counts[2] == [1] * 7
    halves = [
        {i for step in plan.steps() if step.epoch == epoch for i in step.positions if 10 <= i < 30}
        for epoch in range(4)
    ]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(10, 30))
    assert halves[0] not in halves[1:]


def test_the_steps_of_a_mixture_count_the_epochs_lengths_even_where_they_differ():
    # Half of 7 samples: 3, then 4.
    parts = [Part(7, 0.5)]
    assert [epoch_length(parts, epoch) for epoch in range(4)] == [3, 4, 3, 4]
    assert first_steps(parts, global_batch_size=3, epochs=4) == [0, 1, 3, 4, 6]
    plan = make_plan(make_mixture([0.5], [7]), global_batch_size=3, epochs=4)
    steps = list(plan.steps())
    assert [(step.index, step.epoch, len(step.positions)) for step in steps] == [
        (0, 0, 3), (1, 1, 3), (2, 1, 1), (3, 2, 3), (4, 3, 3), (5, 3, 1)
    ]  # fmt: skip
    assert [plan.epochs_done(step) for step in steps] == [1, 1.5, 2, 3, 3.5, 4]
    for start in range(len(steps) + 1):
        assert list(plan.steps(start)) == steps[start:]
