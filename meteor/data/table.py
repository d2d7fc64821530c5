"""The sample table: everything that a training worker needs from the data set, planned on the driver, stored with the run.

Workers read this table, the token tables that it names, and the feature cache. They open no annotation file, and with
cached features they open no image.
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

# Value of ``max_text_tokens`` if the sample's text is not cut.
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
    """Samples with their image keys and lengths, and the token tables that hold their text.

    Attributes:
        parts: number and weight of each annotation file's rows, which are consecutive; the training order needs both.
        grouping_lengths: lengths by which samples are grouped into batches, whatever the projector.
        lengths: tokens of each sample, including the projector's visual tokens.
        num_sub_images: number of sub-images of each sample that the projector gets.
        sample_ids: ids of the samples, unique in the table.
    """

    def __init__(self, table: pa.Table, tokens: Sequence[TokenTable], parts: Sequence[Part] = ()) -> None:
        """Join a table of samples with its token tables.

        Args:
            table: table with the schema `SAMPLE_SCHEMA`.
            tokens: token table of each part, to whose rows ``token_row`` refers.
            parts: parts in the order of the rows; by default one part with all rows.
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
        """Return tokens and labels of a sample, with one placeholder for each image."""
        tokens = self._tokens[bisect.bisect_right(self._part_ends, position)]
        limit = self._columns["max_text_tokens"][position].as_py()
        return tokens.row(self._columns["token_row"][position].as_py(), None if limit == WHOLE else limit)

    def image_keys(self, position: int) -> list[str]:
        """Return the keys of a sample's images, in the order of the placeholders."""
        return self._columns["image_keys"][position].as_py()

    def num_answer_tokens(self, position: int) -> int:
        """Return the number of labels that enter the loss; a row's first token never does, as nothing predicts it."""
        return self._columns["num_answer_tokens"][position].as_py()

    def max_token_id(self) -> int:
        """Return the largest token id in the token tables, of samples that are left out too."""
        return max(tokens.max_token_id() for tokens in self._tokens)

    def answer_counts(self) -> list[int]:
        """Return `num_answer_tokens` of every sample."""
        return self._columns["num_answer_tokens"].to_pylist()

    def totals(self) -> dict[str, int]:
        """Return counts for plans and summaries; separators after slices count as text, as in `Batch.num_text_tokens`."""
        names = ("sub_images", "visual_tokens", "text_tokens")
        return {
            "samples": len(self),
            **{name: int(self._table[f"num_{name}"].to_numpy().sum()) for name in names},
            "images": len(self.flat_image_keys()),
            "distinct_images": pc.count_distinct(self.flat_image_keys()).as_py(),
        }

    def flat_image_keys(self) -> pa.StringArray:
        """Return the image keys of all samples in order, with repeats."""
        return self._columns["image_keys"].flatten()

    def write(self, uri: str) -> None:
        """Store the table; its token tables must be stored already, and only their URIs are written."""
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
        """Join the rows of several tables, each with a weight; see `meteor.data.order.epoch_samples`."""
        return cls(
            pa.concat_tables([table._table for table in tables]),
            [tokens for table in tables for tokens in table._tokens],
            [Part(len(table), weight) for table, weight in zip(tables, weights, strict=True)],
        )
