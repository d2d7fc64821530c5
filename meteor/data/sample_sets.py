"""Sample sets: the samples of an annotation file as columns, kept by the file's content so that JSON is parsed once."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from meteor import storage
from meteor.data.bulk import without_cycle_collector
from meteor.data.samples import Sample, SampleProblem, iter_samples
from meteor.errors import DataError, NotFoundError
from meteor.storage.files import new_file, open_file
from meteor.text.conversation import Role, Turn

# Bumped when the same file would give other records.
_VERSION = 1
_BATCH_SIZE = 4096
_HASH_BLOCK_BYTES = 16 << 20
_ROLES: tuple[Role, Role] = ("human", "gpt")

RECORDS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.string()), nullable=False),
        # Turns alternate and the human begins, so that the words and the number of images say all.
        pa.field("texts", pa.list_(pa.string()), nullable=False),
        pa.field("num_images", pa.list_(pa.int16()), nullable=False),
        pa.field("type", pa.string(), nullable=False),
        pa.field("system", pa.string()),
    ]
)

# Called with the number of samples that are done, and their number where it is known.
OnProgress = Callable[[int, int | None], None]


@dataclass(frozen=True, eq=False)
class SampleSet:
    """The samples of one annotation file; iterating makes them one after the other.

    Attributes:
        name: of the set, for people.
        uri: of the file.
        digest: sha256 of the file.
        problems: the records that cannot be used.
        records: a table of `RECORDS`, or the URI of one as Parquet.
        weight: passes over the set in an epoch of training.
        id_prefix: stands before every sample's id.
        positions: the rows of ``records`` that belong to the set, ascending; all of them when None.
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
        """A set of samples that are in memory already."""
        return cls(name, uri, digest, tuple(problems), pa.Table.from_batches([_batch(list(samples))], RECORDS))

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Sample]:
        for batch in self.batches():
            yield from batch

    def batches(self) -> Iterator[list[Sample]]:
        """The samples, a few thousand at a time."""
        for batch in self._batches():
            columns = [batch.column(name).to_pylist() for name in RECORDS.names]
            yield [self._sample(*values) for values in zip(*columns, strict=True)]

    @cached_property
    def ids(self) -> pa.StringArray:
        """The samples' ids."""
        ids = self._column("id")
        return pc.binary_join_element_wise(self.id_prefix, ids, "") if self.id_prefix else ids

    @cached_property
    def images(self) -> pa.ListArray:
        """The names of each sample's images."""
        return self._column("images")

    @cached_property
    def distinct_images(self) -> pa.StringArray:
        """The names of the images of all samples, each once."""
        return pc.unique(self.images.flatten())

    @cached_property
    def image_names(self) -> set[str]:
        """`distinct_images` as a set."""
        return set(self.distinct_images.to_pylist())

    @property
    def selection(self) -> str:
        """A fingerprint of which samples of the file belong to the set; "" for all."""
        return "" if self.positions is None else hashlib.sha256(self.positions.astype("<i8").tobytes()).hexdigest()

    def select(self, positions: Sequence[int] | np.ndarray) -> "SampleSet":
        """The samples at these positions, which ascend."""
        chosen = np.asarray(positions, dtype=np.int64)
        return replace(self, positions=chosen if self.positions is None else self.positions[chosen])

    def share(self, fraction: float, seed: int) -> "SampleSet":
        """A seeded share of the samples, in their order; the set itself for a fraction of 1."""
        if fraction == 1:
            return self
        ranked = sorted(range(len(self)), key=lambda i: hashlib.sha256(f"[{seed},{i}]".encode()).digest())
        return self.select(sorted(ranked[: max(1, round(fraction * len(self)))]))

    def with_prefix(self, prefix: str) -> "SampleSet":
        """The set with ids, also of its problems, that begin with ``prefix``."""
        problems = [replace(problem, sample_id=f"{prefix}{problem.sample_id}") for problem in self.problems]
        return replace(self, id_prefix=prefix, problems=problems)

    def count_shared(self, others: Iterable["SampleSet"]) -> int:
        """How many samples show the same images in the same dialogue as a sample of another set."""
        mine = [(sample.images, sample.turns) for sample in self]
        firsts = pa.array([_first_words(images, turns) for images, turns in mine], pa.string())
        found: set[Any] = set()
        for batch in (batch for other in others for batch in other._batches()):
            alike = batch.filter(pc.is_in(_all_first_words(batch), value_set=firsts))
            columns = [alike.column(name).to_pylist() for name in RECORDS.names]
            samples = [self._sample(*values) for values in zip(*columns, strict=True)]
            found.update((sample.images, sample.turns) for sample in samples)
        return sum(one in found for one in mine)

    def _sample(
        self, id_: str, images: list[str], texts: list[str], num_images: list[int], type_: str, system: str | None
    ) -> Sample:
        turns = tuple(
            Turn(_ROLES[number % 2], text, count)
            for number, (text, count) in enumerate(zip(texts, num_images, strict=True))
        )
        return Sample(self.id_prefix + id_, tuple(images), turns, type_, system)

    def _column(self, name: str) -> pa.Array:
        if isinstance(self.records, pa.Table):
            column = self.records[name]
        else:
            with open_file(self.records) as file:
                column = pq.read_table(file, columns=[name])[name]
        combined = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        return combined if self.positions is None else combined.take(pa.array(self.positions))

    def _batches(self) -> Iterator[pa.RecordBatch]:
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

    def _stored_batches(self) -> Iterator[pa.RecordBatch]:
        if isinstance(self.records, pa.Table):
            yield from self.records.to_batches(_BATCH_SIZE)
            return
        with open_file(self.records) as file:
            # Threads would read ahead whole columns.
            yield from pq.ParquetFile(file).iter_batches(_BATCH_SIZE, use_threads=False)


def load_set(uri: str, *, name: str, folder: str, on_progress: OnProgress | None = None) -> SampleSet:
    """Read an annotation file, or find what was read of a file with the same content.

    Args:
        uri: local path or s3://, ``.json`` or ``.jsonl`` (see `meteor.data.samples.iter_samples`).
        name: of the set.
        folder: local or s3:// folder that keeps records by their file's digest; nothing in it ever changes.
        on_progress: called as samples are read; their number is not known.

    Raises:
        NotFoundError, DataError: as `iter_samples`; or the file changed while it was read.
    """
    found = storage.stat(uri)
    digest = _file_digest(uri, folder)
    kept = storage.join(folder, digest)
    records, contents = (
        storage.join(kept, f"records-{_VERSION}.parquet"),
        storage.join(kept, f"problems-{_VERSION}.json"),
    )
    try:
        problems = storage.read_json(contents)
    except NotFoundError:
        with without_cycle_collector():
            problems = _keep_records(uri, records, on_progress)
        if storage.stat(uri) != found:
            raise DataError(f"{uri} changed while it was read: start again when it is whole") from None
        # The records are complete when this is there.
        storage.write_json(contents, problems)
    return SampleSet(name, uri, digest, [SampleProblem(**problem) for problem in problems], records)


def _keep_records(uri: str, target: str, on_progress: OnProgress | None) -> list[dict[str, str]]:
    problems: list[dict[str, str]] = []
    num_read = 0
    with (
        new_file(target) as path,
        pq.ParquetWriter(path, RECORDS, compression="zstd", compression_level=1, use_dictionary=["type"]) as writer,
    ):
        read = iter_samples(uri)
        while some := list(islice(read, _BATCH_SIZE)):
            writer.write_batch(_batch([one for one in some if isinstance(one, Sample)]))
            problems += [vars(one) for one in some if isinstance(one, SampleProblem)]
            num_read += len(some)
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
    """sha256 of the file, as long as it is the one that was hashed before."""
    info = storage.stat(uri)
    known = storage.join(folder, "files", f"{hashlib.sha256(storage.absolute(uri).encode()).hexdigest()}.json")
    state = {"uri": storage.absolute(uri), "size_bytes": info.size_bytes, "etag": info.etag}
    try:
        held = storage.read_json(known)
    except NotFoundError:
        held = {}
    if {key: held.get(key) for key in state} == state:
        return held["digest"]
    digest = _digest(uri)
    storage.write_json(known, {**state, "digest": digest})
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
    """`_first_words` of each record."""
    firsts = []
    for name in ("images", "texts"):
        lists = batch.column(name)
        is_empty = pc.equal(pc.list_value_length(lists), 0)
        # The first value of each list is at its offset; an empty list has none.
        starts = pc.if_else(is_empty, pa.scalar(None, pa.int32()), lists.offsets[:-1])
        firsts.append(pc.fill_null(lists.values.take(starts), ""))
    return pc.binary_join_element_wise(*firsts, "\0")
