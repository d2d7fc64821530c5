"""Batches of the coming steps: images are read ahead in one stream, then each micro batch is collated."""

import itertools
from collections.abc import Callable, Generator, Iterable
from contextlib import closing

from meteor.data.collate import Batch
from meteor.data.order import CountedBatch
from meteor.data.table import SampleTable
from meteor.features import FeatureSource, ImageFeatures
from meteor.text.tokens import TokenisedSample

Collate = Callable[[list[list[tuple[TokenisedSample, list[ImageFeatures]]]], int | None], Batch]


def load_batches(
    micro_batches: Iterable[CountedBatch],
    *,
    table: SampleTable,
    source: FeatureSource,
    collate: Collate,
    num_threads: int,
    max_bytes: int,
) -> Generator[Batch, None, None]:
    """Yield a batch for each micro batch, in order, while images of later batches are read.

    Args:
        micro_batches: rows of table positions, with the step's number of visual tokens per sub-image. The iterable may be
            endless; an empty micro batch gives a batch without samples.
        table: tokens and image keys by position.
        source: source of image features. A cache reads whole images, even if a stage trains on global views alone, because
            an image has a single checksum over all sub-images.
        collate: function that turns rows of samples with their images, and the number of visual tokens, into a batch.
        num_threads, max_bytes: limits of reading ahead (`FeatureCache.prefetch`).
    """
    micro_batches, coming = itertools.tee(micro_batches)
    keys = (key for rows, _ in coming for row in rows for i in row for key in table.image_keys(i))
    with closing(source.prefetch(keys, num_threads=num_threads, max_bytes=max_bytes)) as images:
        for rows, k in micro_batches:
            samples = [[(table.tokens(i), [next(images) for _ in table.image_keys(i)]) for i in row] for row in rows]
            yield collate(samples, k)
