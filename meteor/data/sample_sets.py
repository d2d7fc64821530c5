"""Sample sets: the samples of one or more files as columns, stored by the files' digest, so that they are parsed once."""

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
from meteor.checksums import intact, write_list
from meteor.data.bulk import by_halves, without_cycle_collector
from meteor.data.data_files import DataFiles, find_data_files
from meteor.data.digests import digest_of
from meteor.data.samples import Sample, SampleProblem, failed, samples_in
from meteor.errors import DataError
from meteor.storage.files import new_file, open_file
from meteor.text.conversation import Role, Turn

# Increased when a change of the code gives other records for an unchanged file.
_VERSION = 2
_BATCH_SIZE = 4096
_NUM_DIGITS = 16
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
    """The samples of a file, or of the files of a folder or pattern; iterating makes `Sample` objects one after the other.

    Attributes:
        name: name of the set in messages.
        uri: path, folder or pattern of the files.
        digest: digest of the files (`meteor.data.digests`).
        problems: records that cannot be used.
        records: table with the schema `RECORDS`, or the URI of a Parquet file with it.
        weight: passes over the set per epoch of training.
        id_prefix: text in front of every sample's id.
        positions: rows of ``records`` that belong to the set, ascending; None for all rows.
        root: URI of the file, or of the folder above the files, that hold the images with the prefix `inside_prefix`.
    """

    name: str
    uri: str
    digest: str
    problems: Sequence[SampleProblem]
    records: pa.Table | str
    weight: float = 1.0
    id_prefix: str = ""
    positions: np.ndarray | None = None
    root: str = ""

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

    @cached_property
    def inside_root(self) -> dict[str, str]:
        """The prefix of images inside the set's files -> the place of the files; empty if there are none."""
        prefix = inside_prefix(self.digest)
        return {prefix: self.root} if pc.any(pc.starts_with(self.distinct_images, prefix)).as_py() else {}

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
    """Read files of samples, or find the records that were stored for files with equal content.

    Args:
        uri: local path or s3://, folder or pattern (see `meteor.data.data_files` and `meteor.data.samples.samples_in`).
        name: name of the set.
        folder: local or s3:// folder that stores records by the digest of their file; files in it never change.
        on_progress: called while samples are read; their total is not known.

    Raises:
        NotFoundError: a file does not exist.
        DataError: the form of the files is unknown, one is damaged as a whole, or they changed while they were read.
    """
    files = find_data_files(uri)
    digest = digest_of(files, folder)
    kept = storage.join(folder, digest)
    file, contents = f"records-{_VERSION}.parquet", storage.join(kept, f"records-{_VERSION}.json")
    records = storage.join(kept, file)
    known = intact(contents)
    problems = known["problems"] if known else []
    if known is None:
        with without_cycle_collector():
            problems = _keep_records(files, inside_prefix(digest), records, on_progress)
        if find_data_files(uri) != files:
            raise DataError(f"{uri} changed while it was read: start again when it is complete")
        # Written last: its existence means that the records are complete.
        write_list(contents, [file], problems=problems)
    found = [SampleProblem(**problem) for problem in problems]
    return SampleSet(name, uri, digest, found, records, root=files.root)


def inside_prefix(digest: str) -> str:
    """Return the prefix of the names of images inside the files with a digest; it moves with the files."""
    return f"@{digest[:_NUM_DIGITS]}/"


def _keep_records(files: DataFiles, prefix: str, target: str, on_progress: OnProgress | None) -> list[dict[str, str]]:
    problems: list[dict[str, str]] = []
    num_read = 0
    with (
        new_file(target) as path,
        pq.ParquetWriter(path, RECORDS, compression="zstd", compression_level=1, use_dictionary=["type"]) as writer,
    ):
        read = samples_in(files, prefix)
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
