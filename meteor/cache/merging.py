"""One winner for each image among the rows of the key index and of new ledger records."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meteor.cache.table import sorted_groups


def merge_keys(held: pa.Table, pending: Sequence[pa.Table]) -> pa.Table:
    """One row for each image key, sorted by key: the first that was there, so that a committed row stays where it is.

    A later row replaces it only by holding the attention of more layers, all earlier ones included: so a cache grows
    when a new experiment asks for another layer.
    """
    rows = pa.concat_tables([held, *pending]).combine_chunks()
    order, starts = sorted_groups(rows["image_key"])
    num_rows = np.diff(starts, append=len(order))
    winners = order[starts]
    if num_rows.max(initial=0) > 1:
        sets, wider = layer_sets(rows["attention_layers"])
        for rank in range(1, num_rows.max()):
            contested = np.flatnonzero(num_rows > rank)
            challengers = order[starts[contested] + rank]
            won = wider[sets[challengers], sets[winners[contested]]]
            winners[contested[won]] = challengers[won]
    return rows.take(winners)


def layer_sets(layers: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each row's set of layers, and whether set ``[i, j]`` holds all of j's layers and more."""
    spelled = pc.binary_join(layers.cast(pa.list_(pa.string())).combine_chunks(), ",").dictionary_encode()
    sets = [set(filter(None, text.split(","))) for text in spelled.dictionary.to_pylist()]
    wider = np.array([[one > other for other in sets] for one in sets])
    return spelled.indices.to_numpy(), wider
