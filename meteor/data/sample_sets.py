"""Sample sets: the samples of an annotation file as columns, stored by the file's digest, so that JSON is parsed once."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from meteor import storage
from meteor.checksums import intact, read_checked_json, write_checked_json, write_list
from meteor.data.bulk import by_halves, without_cycle_collector
from meteor.data.samples import Sample, SampleProblem, failed, iter_samples
from meteor.errors import DamagedError, DataError, NotFoundError
from meteor.storage.files import new_file, open_file
from meteor.text.conversation import Role, Turn

# Increased when a change of the code gives other records for an unchanged file.
_VERSION = 2
_BATCH_SIZE = 4096
# Bytes per read while a file is hashed: few requests to S3, and little memory.
_HASH_BLOCK_BYTES = 16 << 20
_ROLES: tuple[Role, Role] = ("human", "gpt")

RECORDS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.string()), nullable=False),
        # Turns alternate and the human begins, so roles need no column.
        pa.field("texts", pa.list_(pa.string()), nullable=False),
        pa.field("num_images", pa.list_(pa.int16()), nullable=False),
        pa.field("type", pa.string(), nullable=False),
        pa.field("system", pa.string()),
    ]
)

# Called with the number of finished samples, and with their total if it is known.
OnProgress = Callable[[int, int | None], None]


@dataclass(frozen=True, eq=False)
class SampleSet:
    """The samples of an annotation file; iterating makes `Sample` objects one after the other.

    Attributes:
        name: name of the set in messages.
        uri: URI of the annotation file.
        digest: sha256 of the annotation file.
        problems: records that cannot be used.
        records: table with the schema `RECORDS`, or the URI of a Parquet file with it.
        weight: passes over the set per epoch of training.
        id_prefix: text in front of every sample's id.
        positions: rows of ``records`` that belong to the set, ascending; None for all rows.
    """

    name: str
    uri: str
    digest: str
    problems: Sequence[SampleProblem]
    records: pa.Table | str
    weight: float = 1.0
    id_prefix: str = ""
    positions: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        name: str,
        samples: Iterable[Sample],
        problems: Sequence[SampleProblem] = (),
        *,
        uri: str = "",
        digest: str = "",
    ) -> "SampleSet":
        """Make a set from samples in memory."""
        return cls(name, uri, digest, tuple(problems), pa.Table.from_batches([_batch(list(samples))], RECORDS))

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Sample]:
        for batch in self.batches():
            yield from samples_of(batch, self.id_prefix)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the samples in batches of up to a few thousand, with the schema `RECORDS` and ids without ``id_prefix``."""
        start = 0
        for batch in self._stored_batches():
            end = start + len(batch)
            if self.positions is None:
                yield batch
            else:
                first, last = np.searchsorted(self.positions, [start, end])
                if first < last:
                    yield batch.take(pa.array(self.positions[first:last] - start))
            start = end

    @cached_property
    def ids(self) -> pa.StringArray:
        """Ids of the samples."""
        ids = self._column("id")
        return pc.binary_join_element_wise(self.id_prefix, ids, "") if self.id_prefix else ids

    @cached_property
    def images(self) -> pa.ListArray:
        """Image names of each sample."""
        return self._column("images")

    @cached_property
    def distinct_images(self) -> pa.StringArray:
        """Image names of all samples, each once."""
        return pc.unique(self.images.flatten())

    @cached_property
    def image_names(self) -> set[str]:
        """`distinct_images` as a set."""
        return set(self.distinct_images.to_pylist())

    @property
    def selection(self) -> str:
        """Fingerprint of the samples that were chosen from the file; "" for all samples."""
        return "" if self.positions is None else hashlib.sha256(self.positions.astype("<i8").tobytes()).hexdigest()

    def select(self, positions: Sequence[int] | np.ndarray) -> "SampleSet":
        """Return the set of the samples at these positions, which must ascend."""
        chosen = np.asarray(positions, dtype=np.int64)
        return replace(self, positions=chosen if self.positions is None else self.positions[chosen])

    def share(self, fraction: float, seed: int) -> "SampleSet":
        """Return a seeded share of the samples in their order; a fraction of 1 returns the set itself."""
        if fraction == 1:
            return self
        # Ranks by hash: a larger share with this seed contains every smaller one.
        ranked = sorted(range(len(self)), key=lambda i: hashlib.sha256(f"[{seed},{i}]".encode()).digest())
        return self.select(sorted(ranked[: max(1, round(fraction * len(self)))]))

    def with_prefix(self, prefix: str) -> "SampleSet":
        """Return the set with ``prefix`` in front of the ids of its samples and problems."""
        problems = [replace(problem, sample_id=f"{prefix}{problem.sample_id}") for problem in self.problems]
        return replace(self, id_prefix=prefix, problems=problems)

    def count_shared(self, others: Iterable["SampleSet"]) -> int:
        """Count the samples whose images and dialogue are equal to those of a sample in another set."""
        # Comparing first words column by column leaves few candidates to be made into Python objects.
        mine = [(sample.images, sample.turns) for sample in self]
        firsts = pa.array([_first_words(images, turns) for images, turns in mine], pa.string())
        found: set[Any] = set()
        for batch in (batch for other in others for batch in other.batches()):
            alike = batch.filter(pc.is_in(_all_first_words(batch), value_set=firsts))
            found.update((sample.images, sample.turns) for sample in samples_of(alike))
        return sum(content in found for content in mine)

    def _column(self, name: str) -> pa.Array:
        if isinstance(self.records, pa.Table):
            column = self.records[name]
        else:
            with open_file(self.records) as file:
                column = pq.read_table(file, columns=[name])[name]
        combined = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        return combined if self.positions is None else combined.take(pa.array(self.positions))

    def _stored_batches(self) -> Iterator[pa.RecordBatch]:
        if isinstance(self.records, pa.Table):
            yield from self.records.to_batches(_BATCH_SIZE)
            return
        with open_file(self.records) as file:
            # With threads, Arrow would read whole columns ahead.
            yield from pq.ParquetFile(file).iter_batches(_BATCH_SIZE, use_threads=False)


def samples_of(batch: pa.RecordBatch, id_prefix: str = "") -> Iterator[Sample]:
    """Make the samples of a batch with the schema `RECORDS`."""
    columns = [batch.column(name).to_pylist() for name in RECORDS.names]
    for id_, images, texts, num_images, type_, system in zip(*columns, strict=True):
        turns = tuple(map(Turn, cycle(_ROLES), texts, num_images))
        yield Sample(id_prefix + id_, tuple(images), turns, type_, system)


def load_set(uri: str, *, name: str, folder: str, on_progress: OnProgress | None = None) -> SampleSet:
    """Read an annotation file, or find the records that were stored for a file with equal content.

    Args:
        uri: local path or s3://, ``.json`` or ``.jsonl`` (see `meteor.data.samples.iter_samples`).
        name: name of the set.
        folder: local or s3:// folder that stores records by the digest of their file; files in it never change.
        on_progress: called while samples are read; their total is not known.

    Raises:
        NotFoundError: the file does not exist.
        DataError: the file is not JSON or not a list of records, or it changed while it was read.
    """
    found = storage.stat(uri)
    digest = _file_digest(uri, folder)
    kept = storage.join(folder, digest)
    file, contents = f"records-{_VERSION}.parquet", storage.join(kept, f"records-{_VERSION}.json")
    records = storage.join(kept, file)
    known = intact(contents)
    problems = known["problems"] if known else []
    if known is None:
        with without_cycle_collector():
            problems = _keep_records(uri, records, on_progress)
        if storage.stat(uri) != found:
            raise DataError(f"{uri} changed while it was read: start again when it is complete")
        # Written last: its existence means that the records are complete.
        write_list(contents, [file], problems=problems)
    return SampleSet(name, uri, digest, [SampleProblem(**problem) for problem in problems], records)


def _keep_records(uri: str, target: str, on_progress: OnProgress | None) -> list[dict[str, str]]:
    problems: list[dict[str, str]] = []
    num_read = 0
    with (
        new_file(target) as path,
        pq.ParquetWriter(path, RECORDS, compression="zstd", compression_level=1, use_dictionary=["type"]) as writer,
    ):
        read = iter_samples(uri)
        while batch := list(islice(read, _BATCH_SIZE)):
            problems += [vars(record) for record in batch if isinstance(record, SampleProblem)]
            samples = [record for record in batch if isinstance(record, Sample)]
            for rows in by_halves(_batch, samples, lambda sample, error: failed(sample[0].id, error)):
                if isinstance(rows, SampleProblem):
                    problems.append(vars(rows))
                else:
                    writer.write_batch(rows)
            num_read += len(batch)
            if on_progress is not None:
                on_progress(num_read, None)
    return problems


def _batch(samples: Sequence[Sample]) -> pa.RecordBatch:
    columns = {
        "id": [sample.id for sample in samples],
        "images": [sample.images for sample in samples],
        "texts": [[turn.text for turn in sample.turns] for sample in samples],
        "num_images": [[turn.num_images for turn in sample.turns] for sample in samples],
        "type": [sample.type for sample in samples],
        "system": [sample.system for sample in samples],
    }
    return pa.record_batch(columns, schema=RECORDS)


def _file_digest(uri: str, folder: str) -> str:
    """Return the file's sha256; a file with unchanged size and etag is not hashed again."""
    info = storage.stat(uri)
    known = storage.join(folder, "files", f"{hashlib.sha256(storage.absolute(uri).encode()).hexdigest()}.json")
    state = {"uri": storage.absolute(uri), "size_bytes": info.size_bytes, "etag": info.etag}
    try:
        held = read_checked_json(known)
    except (NotFoundError, DamagedError):
        held = {}
    if {key: held.get(key) for key in state} == state:
        return held["digest"]
    digest = _digest(uri)
    write_checked_json(known, {**state, "digest": digest})
    return digest


def _digest(uri: str) -> str:
    size_bytes = storage.stat(uri).size_bytes
    digest = hashlib.sha256()
    for start in range(0, size_bytes, _HASH_BLOCK_BYTES):
        digest.update(storage.read_range(uri, start, min(_HASH_BLOCK_BYTES, size_bytes - start)))
    return digest.hexdigest()


def _first_words(images: Sequence[str], turns: Sequence[Turn]) -> str:
    return f"{images[0] if images else ''}\0{turns[0].text}"


def _all_first_words(batch: pa.RecordBatch) -> pa.Array:
    """Return `_first_words` of each record."""
    firsts = []
    for name in ("images", "texts"):
        lists = batch.column(name)
        is_empty = pc.equal(pc.list_value_length(lists), 0)
        # The first value of each list is at the list's offset; an empty list has no first value.
        starts = pc.if_else(is_empty, pa.scalar(None, pa.int32()), lists.offsets[:-1])
        firsts.append(pc.fill_null(lists.values.take(starts), ""))
    return pc.binary_join_element_wise(*firsts, "\0")
