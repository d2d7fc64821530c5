"""The tokens of a sample set, computed once for a tokenizer and a template, and shared by all runs that train on them."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from meteor import storage
from meteor.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from meteor.data.bulk import map_in_order, without_cycle_collector
from meteor.data.sample_sets import OnProgress, SampleSet
from meteor.data.samples import Sample
from meteor.storage.files import new_file, open_file
from meteor.text.batches import BatchTokeniser, TokenBatch
from meteor.text.tokens import TokenisedSample

# Bumped when the same samples would get other tokens.
_VERSION = 1
_LENGTHS = pa.schema(
    [
        ("num_text_tokens", pa.int32()),
        ("num_answer_tokens", pa.int32()),
        ("first_answer", pa.int32()),
        ("problem", pa.string()),
    ]
)


@dataclass(frozen=True, eq=False)
class TokenLengths:
    """What planning needs to know of each row of a token table.

    Attributes:
        num_text_tokens: (N,) int, images not counted.
        num_answer_tokens: (N,) int, labels.
        first_answer: (N,) int, text tokens before the first label.
        problems: row -> what is wrong with its sample, as text that continues ``Sample 'id'``; other rows are left out.
    """

    num_text_tokens: np.ndarray
    num_answer_tokens: np.ndarray
    first_answer: np.ndarray
    problems: dict[int, str]


class TokenTable:
    """Tokens by row; it never changes. A local file is mapped into memory, one on S3 is read."""

    def __init__(self, batches: Sequence[pa.RecordBatch], lengths: TokenLengths | None = None, uri: str = "") -> None:
        self.uri = uri
        self._batches = batches
        self._lengths = lengths
        self._ends = np.cumsum([len(batch) for batch in batches], dtype=np.int64)

    @classmethod
    def of(cls, batches: Iterable[TokenBatch]) -> "TokenTable":
        """A table in memory."""
        batches = list(batches)
        lengths = pa.Table.from_batches(map(_length_batch, batches), _LENGTHS)
        return cls([_token_batch(batch, pa.int32()) for batch in batches], _read_lengths(lengths))

    @classmethod
    def write(cls, uri: str, batches: Iterable[TokenBatch], *, vocabulary_size: int = 1 << 31) -> "TokenTable":
        """Store a table, batch by batch, and open it; ``uri`` ends in ``.arrow``, its lengths are kept beside it."""
        schema = _token_schema(pa.int16() if vocabulary_size <= 1 << 15 else pa.int32())
        lengths = []
        with new_file(uri) as path, pa.ipc.new_file(path, schema) as writer:
            for batch in batches:
                writer.write_batch(_token_batch(batch, schema.field("input_ids").type.value_type))
                lengths.append(_length_batch(batch))
        # The table is complete when its lengths are there.
        with new_file(_lengths_uri(uri)) as path:
            pq.write_table(pa.Table.from_batches(lengths, _LENGTHS), path, compression="zstd")
        return cls.open(uri)

    @classmethod
    def open(cls, uri: str) -> "TokenTable":
        """A stored table. Raises NotFoundError if there is none."""
        is_remote = uri.startswith("s3://")
        reader = pa.ipc.open_file(pa.BufferReader(storage.read_bytes(uri)) if is_remote else open_file(uri))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        return cls(batches, uri=storage.absolute(uri))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @cached_property
    def lengths(self) -> TokenLengths:
        """The lengths of all rows."""
        return self._lengths or stored_lengths(self.uri)

    def row(self, row: int, max_text_tokens: int | None = None) -> TokenisedSample:
        """Tokens and labels of a sample, with one placeholder for each image.

        Args:
            row: of the table.
            max_text_tokens: drop text after so many tokens; images are never cut, not even those after the limit.
        """
        input_ids, is_answer, turns = self._arrays(row, max_text_tokens)
        labels = np.where(is_answer, input_ids, IGNORE_INDEX)
        return TokenisedSample(input_ids.tolist(), labels.tolist(), turns.tolist())

    def num_answer_tokens(self, row: int, max_text_tokens: int) -> int:
        """Labels among so many first text tokens of a row."""
        return int(self._arrays(row, max_text_tokens)[1].sum())

    def _arrays(self, row: int, max_text_tokens: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[number]
        place = row - (int(self._ends[number]) - len(batch))
        input_ids = batch.column("input_ids")[place].values.to_numpy().astype(np.int32)
        is_answer = batch.column("is_answer")[place].values.to_numpy(zero_copy_only=False)
        turns = np.zeros(len(input_ids), np.int32)
        for turn, start, end in batch.column("turns")[place].values.to_numpy().reshape(-1, 3):
            turns[start:end] = turn
        if max_text_tokens is None:
            return input_ids, is_answer, turns
        is_image = input_ids == IMAGE_TOKEN_ID
        kept = is_image | (np.cumsum(~is_image) <= max_text_tokens)
        return input_ids[kept], is_answer[kept], turns[kept]


def tokenise_set(
    samples: SampleSet,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    folder: str | None = None,
    on_progress: OnProgress | None = None,
) -> TokenTable:
    """Tokenise a sample set, or find the table of the same samples, tokenizer and template.

    Args:
        samples: the set, or a share of it.
        tokenizer: a fast tokenizer.
        template: ``plain``, ``vicuna_v1`` or ``chat``.
        folder: local or s3:// folder that keeps tables by what decides about them; nothing in it ever changes. When None,
            the table is in memory alone, for a few samples.
        on_progress: called with the samples done and in all, as they are tokenised.

    Raises:
        SettingsError: the tokenizer does not fit (no end token, no chat template).
    """
    batches = partial(_tokenise, samples, tokenizer, template, on_progress)
    if folder is None:
        return TokenTable.of(batches())
    name = _digest(_VERSION, tokenizer_fingerprint(tokenizer), template, samples.selection)[:32]
    uri = storage.join(folder, samples.digest, f"tokens-{name}.arrow")
    if storage.exists(_lengths_uri(uri)):
        return TokenTable.open(uri)
    return TokenTable.write(uri, batches(), vocabulary_size=len(tokenizer))


def _tokenise(
    samples: SampleSet, tokenizer: PreTrainedTokenizerBase, template: str, on_progress: OnProgress | None
) -> Iterator[TokenBatch]:
    tokeniser = BatchTokeniser(tokenizer, template)

    def tokenise(some: list[Sample]) -> TokenBatch:
        return tokeniser([sample.conversation for sample in some])

    num_done = 0
    with without_cycle_collector():
        for batch in map_in_order(tokenise, samples.batches()):
            yield batch
            num_done += len(batch.problems)
            if on_progress is not None:
                on_progress(num_done, len(samples))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of all that decides about the tokens of a conversation, wherever the tokenizer was loaded from."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls of the tokenizer leave these behind.
    description |= {"truncation": None, "padding": None}
    return _digest(description, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template)


def _digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stored_lengths(uri: str) -> TokenLengths:
    """The lengths of the rows of a stored token table, without its tokens."""
    with open_file(_lengths_uri(uri)) as file:
        return _read_lengths(pq.read_table(file))


def _lengths_uri(uri: str) -> str:
    return f"{uri.removesuffix('.arrow')}.lengths.parquet"


def _read_lengths(table: pa.Table) -> TokenLengths:
    texts, answers, first = (table[name].to_numpy() for name in _LENGTHS.names[:3])
    problems = table["problem"].combine_chunks()
    rows = np.flatnonzero(problems.is_valid().to_numpy(zero_copy_only=False))
    return TokenLengths(texts, answers, first, dict(zip(rows.tolist(), problems.drop_null().to_pylist(), strict=True)))


def _length_batch(batch: TokenBatch) -> pa.RecordBatch:
    is_text = batch.input_ids != IMAGE_TOKEN_ID
    texts, answers = (np.concatenate([[0], np.cumsum(flags)]) for flags in (is_text, batch.is_answer))
    starts, ends = batch.offsets[:-1], batch.offsets[1:]
    # The next label at or after each start; where a sample has none, planning never asks.
    labels = np.append(np.flatnonzero(batch.is_answer), len(batch.input_ids))
    first_label = labels[answers[starts]]
    columns = [
        texts[ends] - texts[starts],
        answers[ends] - answers[starts],
        texts[first_label] - texts[starts],
    ]
    return pa.record_batch([*(column.astype(np.int32) for column in columns), batch.problems], schema=_LENGTHS)


def _token_schema(id_type: pa.DataType) -> pa.Schema:
    # Turns as runs: the turn, where it begins and ends.
    return pa.schema(
        [
            ("input_ids", pa.list_(id_type)),
            ("is_answer", pa.list_(pa.bool_())),
            ("turns", pa.list_(pa.int32())),
        ]
    )


def _token_batch(batch: TokenBatch, id_type: pa.DataType) -> pa.RecordBatch:
    offsets = pa.array(batch.offsets, pa.int32())
    runs, run_offsets = _runs(batch.turns, batch.offsets)
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(batch.input_ids.astype(id_type.to_pandas_dtype()))),
        pa.ListArray.from_arrays(offsets, pa.array(batch.is_answer)),
        pa.ListArray.from_arrays(pa.array(run_offsets, pa.int32()), pa.array(runs.reshape(-1))),
    ]
    return pa.record_batch(columns, schema=_token_schema(id_type))


def _runs(values: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of equal values other than 0, as (value, start, end) in their sample; and where each sample's numbers begin."""
    starts_run = np.ones(len(values) + 1, np.bool_)
    starts_run[1:-1] = values[1:] != values[:-1]
    starts_run[offsets] = True
    bounds = np.flatnonzero(starts_run)
    starts, ends = bounds[:-1], bounds[1:]
    used = values[starts] != 0
    starts, ends = starts[used], ends[used]
    first = offsets[np.searchsorted(offsets, starts, side="right") - 1]
    runs = np.stack([values[starts], starts - first, ends - first], axis=1).astype(np.int32)
    return runs, 3 * np.searchsorted(starts, offsets)
