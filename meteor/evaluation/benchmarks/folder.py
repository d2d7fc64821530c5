"""A benchmark's files as their owners publish them, local or on S3; errors name the missing file and its source."""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from meteor import storage
from meteor.errors import DataError, NotFoundError
from meteor.storage.files import open_file

# The largest published file, MMBench's with its images in base64, has some hundred megabytes.
_MAX_FILE_BYTES = 4 << 30
# Rows of a Parquet file in memory at once; one can hold several images.
_ROWS_AT_ONCE = 64


class Folder:
    """A benchmark's folder.

    Args:
        uri: local folder or s3://, or a file in LLaVA's form.
        benchmark: name of the benchmark in errors.
        origin: place from which the files can be downloaded.
    """

    def __init__(self, uri: str, benchmark: str, origin: str) -> None:
        self.uri, self._benchmark, self._origin = uri, benchmark, origin

    @property
    def is_file(self) -> bool:
        """Whether the URI names a file in LLaVA's form, whose images are under the run's image roots."""
        return self.uri.endswith((".json", ".jsonl"))

    def find(self, *names: str) -> str:
        """Return the URI of the first of these files that exists.

        Raises:
            NotFoundError: none of the files exists; the message names their source.
        """
        for name in names:
            if storage.exists(uri := storage.join(self.uri, name)):
                return uri
        raise self.missing(" or ".join(names))

    def missing(self, name: str) -> NotFoundError:
        """Make the error for a missing file."""
        return NotFoundError(f"{self._benchmark} needs {name} in {self.uri}: download it from {self._origin}")

    def json(self, *names: str) -> Any:
        """Read the first of these files that exists as JSON.

        Raises:
            NotFoundError: none of the files exists.
            DataError: the file is not JSON.
        """
        return read_json(self.find(*names))

    def json_lines(self, *names: str) -> Iterator[Any]:
        """Yield the records of a file with one JSON record per line; see `json`."""
        uri = self.find(*names)
        for line in io.BytesIO(_read(uri)):
            if line.strip():
                yield _parsed(line, uri)

    def table(self, *names: str) -> list[dict[str, str]]:
        """Read a TSV file; every value is a text, even "None" and "nan", which are options; a missing value is ""."""
        uri = self.find(*names)
        data = _read(uri)
        header = data.partition(b"\n")[0].decode("utf-8-sig").strip("\r").split("\t")
        try:
            table = pyarrow.csv.read_csv(
                io.BytesIO(data),
                # A row may contain an image of some megabytes in base64, and Arrow needs every row within one block.
                read_options=pyarrow.csv.ReadOptions(block_size=1 << 28),
                parse_options=pyarrow.csv.ParseOptions(delimiter="\t", newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False
                ),
            )
        except pa.ArrowInvalid as error:
            raise DataError(f"{uri} is not a tab-separated table ({error}): download it again") from error
        return table.to_pylist()

    def parquet_files(self, part: str) -> list[str]:
        """List the URIs of the Parquet files below the folder whose file name begins with ``part``, sorted.

        Raises:
            NotFoundError: there are no such files.
        """
        found = [info.uri for info in storage.list_objects(self.uri) if info.uri.endswith(".parquet")]
        wanted = sorted(uri for uri in found if uri.rpartition("/")[2].startswith(part))
        if not wanted:
            raise self.missing(f"{part}-*.parquet")
        return wanted

    def image_folder(self, *folders: str, embedded: Sequence[str]) -> str:
        """Return which of several folders holds the images, with a slash at its end; "" for the benchmark's own folder.

        Only three of the images are looked for. If all three are missing, the path is wrong; the dataset index reports
        single missing images.

        Args:
            folders: candidates below the benchmark's folder, "" for this folder itself.
            embedded: names of the images without their folder.

        Raises:
            NotFoundError: no folder contains one of the three images.
            DataError: there are no images, and therefore no questions.
        """
        if not embedded:
            raise DataError(f"{self._benchmark}: the files in {self.uri} contain no questions: download them again")
        # On S3 each look is a request, so only the first, the middle and the last image are looked for.
        few = [embedded[i] for i in sorted({0, len(embedded) // 2, len(embedded) - 1})]
        prefixes = [f"{folder}/" if folder else "" for folder in folders]
        for prefix in prefixes:
            if any(storage.exists(storage.join(self.uri, f"{prefix}{name}")) for name in few):
                return prefix
        raise self.missing(" or ".join(f"{prefix}{few[0]}" for prefix in prefixes))


def read_json(uri: str) -> Any:
    """Read a JSON file. Raises DataError if the file is not JSON."""
    return _parsed(_read(uri), uri)


def _read(uri: str) -> bytes:
    return storage.read_bytes(uri, max_bytes=_MAX_FILE_BYTES)


def _parsed(data: bytes, uri: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{uri} is not valid JSON ({error}): download it again") from error


def read_parquet(uri: str, columns: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, a few at a time; columns that the file lacks are left out."""
    with open_file(uri) as source:
        file = pq.ParquetFile(source)
        known = set(file.schema_arrow.names)
        # Read in small batches: a kilobyte of a compressed column can stand for a billion values.
        for rows in file.iter_batches(_ROWS_AT_ONCE, columns=[name for name in columns if name in known]):
            yield from rows.to_pylist()
