"""Batches of the coming steps: their images are read ahead in one stream, then each micro batch is collated."""

import itertools
from collections.abc import Callable, Generator, Iterable
from contextlib import closing

from meteor.data.collate import Batch
from meteor.data.order import MicroBatch
from meteor.data.table import SampleTable
from meteor.features import FeatureSource, ImageFeatures
from meteor.text.tokens import TokenisedSample

Collate = Callable[[list[list[tuple[TokenisedSample, list[ImageFeatures]]]]], Batch]


def load_batches(
    micro_batches: Iterable[MicroBatch],
    *,
    table: SampleTable,
    source: FeatureSource,
    collate: Collate,
    num_threads: int,
    max_bytes: int,
) -> Generator[Batch, None, None]:
    """One batch for each micro batch, in order; images of later ones are read in the meantime.

    Args:
        micro_batches: rows of table positions; may be endless, an empty one gives a batch of no samples.
        table: tokens and image keys by position.
        source: of the images. Of a cache whole images are read, even where a stage trains on global views alone: the
            checksum is one over all sub-images.
        collate: rows of samples with their images -> a batch.
        num_threads, max_bytes: how far images are read ahead (`FeatureCache.prefetch`).
    """
    micro_batches, coming = itertools.tee(micro_batches)
    keys = (key for rows in coming for row in rows for i in row for key in table.image_keys(i))
    with closing(source.prefetch(keys, num_threads=num_threads, max_bytes=max_bytes)) as images:
        for rows in micro_batches:
            yield collate(
                [[(table.tokens(i), [next(images) for _ in table.image_keys(i)]) for i in row] for row in rows]
            )
