"""The sample table: everything a training worker needs of the data set, planned once on the driver, stored with the run.

To train, workers read this table, the token tables that it names, and the feature cache. They open no annotation file, and with
cached features no image.
"""

import bisect
import json
from collections.abc import Sequence
from itertools import accumulate

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from meteor import storage
from meteor.data.order import Part
from meteor.data.token_table import TokenTable
from meteor.text.tokens import TokenisedSample

# In the place of ``max_text_tokens`` when nothing is cut.
WHOLE = -1
SAMPLE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("token_row", pa.int32()),
        ("max_text_tokens", pa.int32()),
        ("image_keys", pa.list_(pa.string())),
        ("num_sub_images", pa.int32()),
        ("num_visual_tokens", pa.int32()),
        ("num_text_tokens", pa.int32()),
        ("num_answer_tokens", pa.int32()),
        ("grouping_length", pa.int32()),
    ]
)
_PARTS = b"parts"


class SampleTable:
    """Samples with their image keys and lengths, over the token tables that hold their words; opened by every worker of a run.

    Attributes:
        parts: rows of one file stand together; the order needs the number and the weight of each file's rows.
        grouping_lengths: lengths that batches are made by, whatever the projector.
        lengths: tokens that each sample really takes.
        num_sub_images: sub-images of each sample that the projector is given.
        sample_ids: unique in the table.
    """

    def __init__(self, table: pa.Table, tokens: Sequence[TokenTable], parts: Sequence[Part] = ()) -> None:
        """Put a table over token tables.

        Args:
            table: columns of `SAMPLE_SCHEMA`.
            tokens: for each part the table that its ``token_row`` counts in.
            parts: in the order of the rows; one of all rows unless given.
        """
        self._table = table
        self._tokens = list(tokens)
        self.parts = list(parts) or [Part(len(table))]
        self._part_ends = list(accumulate(part.num_samples for part in self.parts))
        names = ("token_row", "max_text_tokens", "image_keys", "num_answer_tokens")
        self._columns = {name: table[name].combine_chunks() for name in names}
        self.grouping_lengths: list[int] = table["grouping_length"].to_pylist()
        self.lengths: list[int] = pc.add(table["num_visual_tokens"], table["num_text_tokens"]).to_pylist()
        self.num_sub_images: list[int] = table["num_sub_images"].to_pylist()
        self.sample_ids: list[str] = table["sample_id"].to_pylist()

    def __len__(self) -> int:
        return self._table.num_rows

    def tokens(self, position: int) -> TokenisedSample:
        """Tokens and labels of a sample, one placeholder for each image."""
        tokens = self._tokens[bisect.bisect_right(self._part_ends, position)]
        limit = self._columns["max_text_tokens"][position].as_py()
        return tokens.row(self._columns["token_row"][position].as_py(), None if limit == WHOLE else limit)

    def image_keys(self, position: int) -> list[str]:
        return self._columns["image_keys"][position].as_py()

    def num_answer_tokens(self, position: int) -> int:
        """Labels that the loss counts; the first token of a row has nothing before it and is never one."""
        return self._columns["num_answer_tokens"][position].as_py()

    def answer_counts(self) -> list[int]:
        """`num_answer_tokens` of every sample."""
        return self._columns["num_answer_tokens"].to_pylist()

    def totals(self) -> dict[str, int]:
        """Counts for plans and summaries; the separators after slices are text, as in `Batch.num_text_tokens`."""
        names = ("sub_images", "visual_tokens", "text_tokens")
        return {
            "samples": len(self),
            **{name: int(self._table[f"num_{name}"].to_numpy().sum()) for name in names},
            "images": len(self.flat_image_keys()),
            "distinct_images": pc.count_distinct(self.flat_image_keys()).as_py(),
        }

    def flat_image_keys(self) -> pa.StringArray:
        """The keys of all samples' images, in order, as often as they are shown."""
        return self._columns["image_keys"].flatten()

    def all_image_keys(self) -> list[str]:
        """`flat_image_keys` as a list."""
        return self.flat_image_keys().to_pylist()

    def write(self, uri: str) -> None:
        """Store the table. Its token tables are stored already, and stay where they are."""
        assert all(tokens.uri for tokens in self._tokens), "workers read token tables by their URI"
        parts = [
            (part.num_samples, part.weight, tokens.uri) for part, tokens in zip(self.parts, self._tokens, strict=True)
        ]
        sink = pa.BufferOutputStream()
        table = self._table.replace_schema_metadata({_PARTS: json.dumps(parts)})
        pq.write_table(table, sink, compression="zstd")
        storage.write_bytes(uri, sink.getvalue().to_pybytes())

    @classmethod
    def read(cls, uri: str) -> "SampleTable":
        """Open a stored table and its token tables."""
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
        stored = json.loads(table.schema.metadata[_PARTS])
        parts = [Part(num_samples, weight) for num_samples, weight, _ in stored]
        return cls(table, [TokenTable.open(tokens) for _, _, tokens in stored], parts)

    @classmethod
    def mixture(cls, tables: Sequence["SampleTable"], weights: Sequence[float]) -> "SampleTable":
        """The rows of several tables, each with its weight; see `meteor.data.order.epoch_samples`."""
        return cls(
            pa.concat_tables([one._table for one in tables]),
            [tokens for one in tables for tokens in one._tokens],
            [Part(len(table), weight) for table, weight in zip(tables, weights, strict=True)],
        )
