"""Batches whose images are read ahead: the same as one image after the other, with many on their way at once."""

import itertools
import threading

import pyarrow as pa
import pytest

from meteor.cache.prefetch import read_ahead
from meteor.constants import IMAGE_PLACE
from meteor.data.table import SAMPLE_SCHEMA, WHOLE, SampleTable
from meteor.data.token_table import TokenTable
from meteor.errors import DataError
from meteor.text.batches import TokenBatch
from meteor.text.tokens import TokenisedSample
from meteor.train.loading import load_batches

MICRO_BATCHES = [[[0], [1]], [], [[5, 2], [3]], [[4]], [[1, 0]]]


def make_table():
    """Sample i has i % 3 images; some of them are those of other samples."""
    rows, tokens = [], []
    for i in range(6):
        keys = [f"k{(i + j) % 5}" for j in range(i % 3)]
        ids = [1, *[IMAGE_PLACE] * len(keys), 10 + i, 2]
        rows.append(
            {
                "sample_id": f"s{i}",
                "token_row": i,
                "max_text_tokens": WHOLE,
                "image_keys": keys,
                "num_sub_images": len(keys),
                "num_visual_tokens": 4 * len(keys),
                "num_text_tokens": len(ids) - len(keys),
                "num_answer_tokens": len(ids),
                "grouping_length": len(ids),
            }
        )
        tokens.append(TokenisedSample(ids, ids))
    return SampleTable(pa.Table.from_pylist(rows, SAMPLE_SCHEMA), [TokenTable.of([TokenBatch.of(tokens)])])


class SlowSource:
    """Images (their keys alone) that arrive only when so many are on their way at once."""

    def __init__(self, num_together):
        self.together = threading.Barrier(num_together) if num_together > 1 else None
        self.asked = []

    def get(self, image_key):
        self.asked.append(image_key)
        if self.together:
            self.together.wait(20)
        return image_key

    def prefetch(self, keys, *, num_threads, max_bytes):
        return read_ahead(keys, self.get, lambda key: 1, num_threads=num_threads, max_bytes=max_bytes)


def load(source, micro_batches, **options):
    """Batches as what would be collated: (first text token, images) of each sample."""
    settings = {"num_threads": 4, "max_bytes": 100, **options}
    return load_batches(
        ((rows, None) for rows in micro_batches),
        table=make_table(),
        source=source,
        collate=lambda rows, k: [[(list(tokens.input_ids)[-2] - 10, images) for tokens, images in row] for row in rows],
        **settings,
    )


@pytest.mark.parametrize("max_bytes", [1, 2, 100])
def test_each_sample_gets_its_own_images_in_order(max_bytes):
    table = make_table()
    batches = list(load(SlowSource(1), MICRO_BATCHES, max_bytes=max_bytes))
    assert batches == [[[(i, list(table.image_keys(i))) for i in row] for row in rows] for rows in MICRO_BATCHES]


def test_images_of_several_batches_are_on_their_way_at_once():
    # Each of the four waits for the other three: one after the other, or batch by batch, none would ever arrive.
    source = SlowSource(4)
    batches = list(load(source, [[[1]], [[4]], [[2]]], num_threads=4))
    assert batches == [[[(1, ["k1"])]], [[(4, ["k4"])]], [[(2, ["k2", "k3"])]]]


def test_an_endless_plan_is_read_no_further_than_the_memory_allows():
    source = SlowSource(1)
    batches = load(source, itertools.cycle([[[1]], [[2]], [[4]], [[5]]]), max_bytes=3)
    for _ in range(10):
        next(batches)
    batches.close()
    assert len(source.asked) <= 10 * 2 + 3 + 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_no_samples_at_all_make_an_empty_batch_and_read_nothing():
    source = SlowSource(1)
    assert list(load(source, [[]])) == [[]]
    assert source.asked == []


def test_an_error_of_an_image_comes_with_its_batch():
    class Broken(SlowSource):
        def get(self, image_key):
            if image_key == "k4":
                raise DataError("no such image")
            return image_key

    batches = load(Broken(1), [[[1]], [[2]], [[4]], [[0]]])
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(DataError, match="no such image"):
        next(batches)
