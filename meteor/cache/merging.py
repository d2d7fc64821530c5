"""Merging of new ledger records into the key index, with one row per image."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meteor.cache.table import sorted_groups


def merge_keys(held: pa.Table, pending: Sequence[pa.Table]) -> pa.Table:
    """Choose one row per image key, sorted by key: the first, so that committed rows stay.

    A later row wins only if it has the attention of all layers of the earlier row and of more. A cache can grow in this
    way when a new experiment needs another layer.
    """
    rows = pa.concat_tables([held, *pending]).combine_chunks()
    order, starts = sorted_groups(rows["image_key"])
    num_rows = np.diff(starts, append=len(order))
    winners = order[starts]
    if num_rows.max(initial=0) > 1:
        sets, wider = layer_sets(rows["attention_layers"])
        # The loop compares the second row of all images at once, then the third, and so on.
        for rank in range(1, num_rows.max()):
            contested = np.flatnonzero(num_rows > rank)
            challengers = order[starts[contested] + rank]
            won = wider[sets[challengers], sets[winners[contested]]]
            winners[contested[won]] = challengers[won]
    return rows.take(winners)


def layer_sets(layers: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct sets of layers.

    Returns:
        (rows,) number of each row's set, and (sets, sets) bool, whether set i has all layers of set j and more.
    """
    spelled = pc.binary_join(layers.cast(pa.list_(pa.string())).combine_chunks(), ",").dictionary_encode()
    sets = [set(filter(None, text.split(","))) for text in spelled.dictionary.to_pylist()]
    wider = np.array([[layers > others for others in sets] for layers in sets])
    return spelled.indices.to_numpy(), wider
