"""Token tables: the tokens of a sample set for a tokenizer and a template, computed once and shared by all runs."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from meteor import storage
from meteor.checksums import intact, write_list
from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.data.bulk import by_halves, map_in_processes, without_cycle_collector
from meteor.data.sample_sets import OnProgress, SampleSet, samples_of
from meteor.data.samples import describe
from meteor.storage.files import new_file, open_file
from meteor.text.batches import BatchTokeniser, TokenBatch
from meteor.text.tokens import TokenisedSample

# Increased when a change of the code gives other tokens for unchanged samples.
_VERSION = 2
# Fewer samples are tokenised sooner than processes start.
_MIN_FOR_PROCESSES = 50_000
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
    """Numbers about each row of a token table, from which a sample table is planned.

    Attributes:
        num_text_tokens: (N,) int, number of tokens without image placeholders.
        num_answer_tokens: (N,) int, number of labels.
        first_answer: (N,) int, number of text tokens before the first label.
        problems: row -> problem of the row's sample, as text that continues ``Sample 'id'``; only rows with a problem.
    """

    num_text_tokens: np.ndarray
    num_answer_tokens: np.ndarray
    first_answer: np.ndarray
    problems: dict[int, str]


class TokenTable:
    """Immutable table of tokens by row; a local file is mapped into memory, a file on S3 is read into memory."""

    def __init__(self, batches: Sequence[pa.RecordBatch], lengths: TokenLengths | None = None, uri: str = "") -> None:
        self.uri = uri
        self._batches = batches
        self._lengths = lengths
        self._ends = np.cumsum([len(batch) for batch in batches], dtype=np.int64)

    @classmethod
    def of(cls, batches: Iterable[TokenBatch]) -> "TokenTable":
        """Make a table in memory."""
        batches = list(batches)
        lengths = pa.Table.from_batches(map(_length_batch, batches), _LENGTHS)
        return cls([_token_batch(batch, pa.int32()) for batch in batches], _read_lengths(lengths))

    @classmethod
    def write(cls, uri: str, batches: Iterable[TokenBatch], *, vocabulary_size: int = 1 << 31) -> "TokenTable":
        """Store a table batch by batch and open it; ``uri`` ends in ``.arrow``, and the lengths are stored beside it."""
        # Ids are written as numbers of fixed size, so that a row can be read from the mapped file without decoding.
        # A small vocabulary fits into 16 bits, which halves the file.
        schema = _token_schema(pa.int16() if vocabulary_size <= 1 << 15 else pa.int32())
        lengths = []
        with new_file(uri) as path, pa.ipc.new_file(path, schema) as writer:
            for batch in batches:
                writer.write_batch(_token_batch(batch, schema.field("input_ids").type.value_type))
                lengths.append(_length_batch(batch))
        # Written last: the existence of the lengths means that the table is complete.
        with new_file(_lengths_uri(uri)) as path:
            pq.write_table(pa.Table.from_batches(lengths, _LENGTHS), path, compression="zstd")
        return cls.open(uri)

    @classmethod
    def open(cls, uri: str) -> "TokenTable":
        """Open a stored table. Raises NotFoundError if it does not exist."""
        is_remote = uri.startswith("s3://")
        reader = pa.ipc.open_file(pa.BufferReader(storage.read_bytes(uri)) if is_remote else open_file(uri))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        return cls(batches, uri=storage.absolute(uri))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def max_token_id(self) -> int:
        """Return the largest token id, or `IMAGE_PLACE`, which is below 0, if there is none."""
        columns = (batch.column("input_ids").values for batch in self._batches)
        return max((pc.max(ids).as_py() for ids in columns if len(ids)), default=IMAGE_PLACE)

    @cached_property
    def lengths(self) -> TokenLengths:
        """Lengths of all rows."""
        return self._lengths or stored_lengths(self.uri)

    def row(self, row: int, max_text_tokens: int | None = None) -> TokenisedSample:
        """Return tokens and labels of a sample, with one placeholder for each image.

        Args:
            row: row of the table.
            max_text_tokens: number of text tokens after which text is dropped; images are never cut, not even images
                behind the limit.
        """
        batch, place = self._place(row)
        input_ids, is_answer = _ids_and_answers(batch, place)
        turns = np.zeros(len(input_ids), np.int32)
        for turn, start, end in batch.column("turns")[place].values.to_numpy().reshape(-1, 3):
            turns[start:end] = turn
        labels = np.where(is_answer, input_ids, IGNORE_INDEX)
        kept = slice(None) if max_text_tokens is None else _kept(input_ids, max_text_tokens)
        return TokenisedSample(input_ids[kept].tolist(), labels[kept].tolist(), turns[kept].tolist())

    def num_answer_tokens(self, row: int, max_text_tokens: int) -> int:
        """Count the labels among the first ``max_text_tokens`` text tokens of a row."""
        input_ids, is_answer = _ids_and_answers(*self._place(row))
        return int(is_answer[_kept(input_ids, max_text_tokens)].sum())

    def _place(self, row: int) -> tuple[pa.RecordBatch, int]:
        """Return the batch that holds a row, and the row's position in it."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[number]
        return batch, row - (int(self._ends[number]) - len(batch))


def _ids_and_answers(batch: pa.RecordBatch, place: int) -> tuple[np.ndarray, np.ndarray]:
    input_ids = batch.column("input_ids")[place].values.to_numpy().astype(np.int32)
    return input_ids, batch.column("is_answer")[place].values.to_numpy(zero_copy_only=False)


def _kept(input_ids: np.ndarray, max_text_tokens: int) -> np.ndarray:
    """Return which tokens stay if text is cut: all images, and the first ``max_text_tokens`` others."""
    is_image = input_ids == IMAGE_PLACE
    return is_image | (np.cumsum(~is_image) <= max_text_tokens)


def tokenise_set(
    samples: SampleSet,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    folder: str | None = None,
    on_progress: OnProgress | None = None,
) -> TokenTable:
    """Tokenise a sample set, or find the stored table for equal samples, tokenizer and template.

    Args:
        samples: sample set, possibly a share of a file.
        tokenizer: a fast tokenizer.
        template: ``plain``, ``vicuna_v1`` or ``chat``.
        folder: local or s3:// folder that stores tables by a digest of these three; files in it never change. If None, the
            table is only in memory, which suits a few samples.
        on_progress: called with the number of finished samples and of all samples.

    Raises:
        SettingsError: the tokenizer does not fit (no end token, no chat template).
    """
    batches = partial(_tokenise, samples, tokenizer, template, on_progress)
    if folder is None:
        return TokenTable.of(batches())
    name = f"tokens-{_digest(_VERSION, tokenizer_fingerprint(tokenizer), template, samples.selection)[:32]}"
    place = storage.join(folder, samples.digest)
    uri, contents = storage.join(place, f"{name}.arrow"), storage.join(place, f"{name}.json")
    if intact(contents):
        return TokenTable.open(uri)
    table = TokenTable.write(uri, batches(), vocabulary_size=len(tokenizer))
    # Written last: its existence means that both files are complete.
    write_list(contents, [f"{name}.arrow", f"{name}.lengths.parquet"])
    return table


def _tokenise(
    samples: SampleSet, tokenizer: PreTrainedTokenizerBase, template: str, on_progress: OnProgress | None
) -> Iterator[TokenBatch]:
    make = partial(_make_tokenise, tokenizer, template)
    batches = samples.batches()
    num_done = 0
    with without_cycle_collector():
        for parts in map(make(), batches) if len(samples) < _MIN_FOR_PROCESSES else map_in_processes(make, batches):
            yield from parts
            num_done += sum(len(part.problems) for part in parts)
            if on_progress is not None:
                on_progress(num_done, len(samples))


def _make_tokenise(tokenizer: PreTrainedTokenizerBase, template: str) -> Callable[[pa.RecordBatch], list[TokenBatch]]:
    tokeniser = BatchTokeniser(tokenizer, template)

    def tokenise(batch: pa.RecordBatch) -> TokenBatch:
        return tokeniser([sample.conversation for sample in samples_of(batch)])

    return lambda batch: list(by_halves(tokenise, batch, _without_tokens))


def _without_tokens(sample: pa.RecordBatch, error: BaseException) -> TokenBatch:
    """Make the empty row of a sample whose tokenisation failed."""
    return replace(TokenBatch.of([TokenisedSample([], [])]), problems=[f" cannot be tokenised ({describe(error)})"])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of everything that decides about a conversation's tokens, whatever the tokenizer's location."""
    # Truncation and padding, which earlier calls leave in the backend, come before the added tokens.
    _, found, content = tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')
    assert found, "the library writes a tokenizer's parts in this order"
    return _digest(content, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template)


def _digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stored_lengths(uri: str) -> TokenLengths:
    """Read the lengths of a stored token table's rows, without its tokens."""
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
    is_text = batch.input_ids != IMAGE_PLACE
    texts, answers = (np.concatenate([[0], np.cumsum(flags)]) for flags in (is_text, batch.is_answer))
    starts, ends = batch.offsets[:-1], batch.offsets[1:]
    # The next label at or after each start. A sample without labels gets another sample's, which planning never reads.
    labels = np.append(np.flatnonzero(batch.is_answer), len(batch.input_ids))
    first_label = labels[answers[starts]]
    columns = [
        texts[ends] - texts[starts],
        answers[ends] - answers[starts],
        texts[first_label] - texts[starts],
    ]
    return pa.record_batch([*(column.astype(np.int32) for column in columns), batch.problems], schema=_LENGTHS)


def _token_schema(id_type: pa.DataType) -> pa.Schema:
    # Turns are stored as runs (turn, start, end), three numbers per run instead of one per token.
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
    """Find the runs of equal values other than 0 within samples.

    Args:
        values: (tokens,) int, values of all samples one after the other.
        offsets: (samples + 1,) int, start of each sample in ``values``, and its length.

    Returns:
        (runs, 3) int32 rows (value, start, end), counted from the sample's start; and (samples + 1,) offsets of each
        sample's numbers in the flattened rows.
    """
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
