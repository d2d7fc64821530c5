"""Writer of feature files: immutable Parquet files of many images, in which each payload is a known byte range."""

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from meteor import storage
from meteor.cache.calibration import codec_of
from meteor.cache.codec import Codec
from meteor.cache.folder import DATA, LEDGER, CacheInfo, read_cache_info
from meteor.cache.packing import codec_metadata
from meteor.cache.row import FEATURE_SCHEMA, IMAGE_FIELDS, PAYLOAD_COLUMNS, payload_crc32, payload_layout
from meteor.cache.table import fit_schema, table_bytes, versioned
from meteor.constants import CACHE_SCHEMA_VERSION
from meteor.errors import CacheError, StorageError

_IMAGE_COLUMNS = [field.name for field in IMAGE_FIELDS]
_RANGE_FIELDS = [
    pa.field(f"{name}_{part}", pa.int64(), nullable=False) for name in PAYLOAD_COLUMNS for part in ("offset", "size")
]
# Columns of ledger records and of the key index, with the places of each image's payloads.
KEY_SCHEMA = versioned(
    pa.schema(
        [
            *IMAGE_FIELDS,
            pa.field("file", pa.string(), nullable=False),
            pa.field("row_group", pa.int32(), nullable=False),
            *_RANGE_FIELDS,
        ]
    ),
    CACHE_SCHEMA_VERSION,
)


@dataclass(frozen=True, eq=False)
class FileRecord:
    """A finished data file.

    Attributes:
        file: name of the file below the cache's URI.
        size_bytes: size of the file.
        rows: places of the images, a table with `KEY_SCHEMA`.
    """

    file: str
    size_bytes: int
    rows: pa.Table

    @property
    def num_images(self) -> int:
        """Number of images in the file."""
        return self.rows.num_rows


def write_feature_file(
    cache_uri: str, rows: Iterable[pa.RecordBatch | pa.Table], codec: Codec | None = None
) -> FileRecord:
    """Write a data file and then its ledger record, through which the next commit includes it.

    Args:
        cache_uri: URI from `create_cache`.
        rows: rows from `encode_row`, in tables of any size. The file is built in memory.
        codec: codec of the rows; by default the cache's codec with its calibration.

    Raises:
        CacheError: there are no rows, or their codec or calibration is not the cache's.
    """
    info = read_cache_info(cache_uri)
    codec = codec or codec_of(cache_uri, info)
    if codec.name != info.codec:
        raise CacheError(f"rows of codec {codec.name} do not belong in {cache_uri}, whose codec is {info.codec}")
    file_id = uuid.uuid4().hex
    file = f"{DATA}/{file_id}.parquet"
    data, sizes = _parquet_bytes(rows, file_metadata(info, codec))
    record = FileRecord(file, len(data), _locate(file, data, sizes, codec))
    uri = storage.join(cache_uri, file)
    storage.write_bytes(uri, data)
    # The content was checked in memory, so its size in the store shows whether it arrived completely.
    if (stored := storage.stat(uri).size_bytes) != len(data):
        raise StorageError(f"{uri} has {stored} bytes after {len(data)} were written; the store lost some, write again")
    storage.write_bytes(storage.join(cache_uri, LEDGER, f"features-{file_id}.parquet"), table_bytes(record.rows))
    # `gc` deletes a file without a record, and then looks for the record. Here the record comes first and then the look for
    # the file, so in a race at least one of the two notices the other.
    if not storage.exists(uri):
        storage.write_bytes(uri, data)
    return record


def file_metadata(info: CacheInfo, codec: Codec) -> dict[str, str]:
    """Return the metadata of a data file: the cache key, the codec and the calibration's digest."""
    return {"cache_key": info.identity.key, **codec_metadata(codec)}


def _parquet_bytes(
    rows: Iterable[pa.RecordBatch | pa.Table], metadata: dict[str, str]
) -> tuple[memoryview, list[tuple[int, int, int]]]:
    """Build the file, and return it with each row's payload sizes in the order of `PAYLOAD_COLUMNS`."""
    # Arrow's own stream is twice as fast as a file object of Python's io.
    sink, sizes = pa.BufferOutputStream(), []
    schema = versioned(FEATURE_SCHEMA.with_metadata(metadata), CACHE_SCHEMA_VERSION)
    # With these options, a value is one plain, uncompressed page without levels, and ends where its column chunk ends.
    # `_locate` computes byte ranges from this.
    with pq.ParquetWriter(
        sink,
        schema,
        use_dictionary=False,
        compression="NONE",
        write_statistics=False,
        write_page_checksum=True,
        data_page_version="1.0",
    ) as writer:
        for row in _single_rows(rows, metadata):
            writer.write_table(row.replace_schema_metadata(schema.metadata), row_group_size=1)
            features, cls_attention, cls = (len(row[name][0].as_buffer()) for name in PAYLOAD_COLUMNS)
            sizes.append((features, cls_attention, cls))
    return memoryview(sink.getvalue()), sizes


def _single_rows(pieces: Iterable[pa.RecordBatch | pa.Table], metadata: dict[str, str]) -> Iterator[pa.Table]:
    for piece in pieces:
        table = piece if isinstance(piece, pa.Table) else pa.Table.from_batches([piece])
        given = table.schema.metadata or {}
        for name, value in metadata.items():
            if (found := given.get(name.encode(), value.encode()).decode()) != value:
                raise CacheError(
                    f"rows of {name} {found} do not belong in a file of {name} {value}: encode them with "
                    "meteor.cache.open_codec(cache_uri)"
                )
        # Ray may change the nullability of columns, or widen the offsets of strings and bytes.
        table = fit_schema(table, FEATURE_SCHEMA, "a table of feature rows")
        for position in range(table.num_rows):
            yield table.slice(position, 1)


def _locate(file: str, data: memoryview, sizes: list[tuple[int, int, int]], codec: Codec) -> pa.Table:
    """Compute the byte range of every payload in the file, and prove it by the row's checksum."""
    if not sizes:
        raise CacheError("a feature file needs at least one row")
    parquet = pq.ParquetFile(pa.BufferReader(pa.py_buffer(data)))
    chunks = {parquet.metadata.schema.column(i).path: i for i in range(parquet.metadata.num_columns)}
    located = []
    for group, fields in enumerate(parquet.read(columns=_IMAGE_COLUMNS).to_pylist()):
        payload_layout(fields, sizes[group], codec)
        fields |= {"file": file, "row_group": group}
        payloads = []
        for name, size in zip(PAYLOAD_COLUMNS, sizes[group], strict=True):
            chunk = parquet.metadata.row_group(group).column(chunks[name])
            end = chunk.data_page_offset + chunk.total_compressed_size
            fields |= {f"{name}_offset": end - size, f"{name}_size": size}
            payloads.append(data[end - size : end])
        if payload_crc32(*payloads) != fields["crc32"]:
            raise CacheError(
                f"image {fields['image_key']}: the bytes in the file do not match the row's checksum: the row was "
                "changed after encoding, or this pyarrow lays values out in another way"
            )
        located.append(fields)
    return pa.Table.from_pylist(located, schema=KEY_SCHEMA)
