"""A benchmark's files as their owners publish them, local or on S3; errors name what is missing and where it is to be had."""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from meteor import storage
from meteor.errors import DataError, NotFoundError


class Folder:
    """One benchmark's folder.

    Args:
        uri: local folder or s3://; or one LLaVA file.
        benchmark: its name, for errors.
        origin: where its files are to be had.
    """

    def __init__(self, uri: str, benchmark: str, origin: str) -> None:
        self.uri, self._benchmark, self._origin = uri, benchmark, origin

    @property
    def is_file(self) -> bool:
        """Whether it is one LLaVA file, whose images are under the run's image roots."""
        return self.uri.endswith((".json", ".jsonl"))

    def find(self, *names: str) -> str:
        """The URI of the first of these files that is there.

        Raises:
            NotFoundError: none of them is, with where they are to be had.
        """
        for name in names:
            if storage.exists(uri := storage.join(self.uri, name)):
                return uri
        raise self.missing(" or ".join(names))

    def missing(self, name: str) -> NotFoundError:
        return NotFoundError(f"{self._benchmark} needs {name} in {self.uri}: it is to be had from {self._origin}")

    def json(self, *names: str) -> Any:
        """Raises:
        NotFoundError: see `find`.
        DataError: it is not JSON.
        """
        uri = self.find(*names)
        return _parsed(storage.read_bytes(uri), uri)

    def json_lines(self, *names: str) -> Iterator[Any]:
        """One record a line; see `json`."""
        uri = self.find(*names)
        for line in storage.read_bytes(uri).split(b"\n"):
            if line.strip():
                yield _parsed(line, uri)

    def table(self, *names: str) -> list[dict[str, str]]:
        """A TSV file; every value a text, also "None" and "nan", which are options here; "" where there is none."""
        uri = self.find(*names)
        data = storage.read_bytes(uri)
        header = data.partition(b"\n")[0].decode("utf-8-sig").strip("\r").split("\t")
        try:
            table = pyarrow.csv.read_csv(
                io.BytesIO(data),
                # An image in base64 is a megabyte and more; a block must hold a whole row.
                read_options=pyarrow.csv.ReadOptions(block_size=1 << 28),
                parse_options=pyarrow.csv.ParseOptions(delimiter="\t", newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False
                ),
            )
        except pa.ArrowInvalid as error:
            raise DataError(f"{uri} is no tab-separated table ({error}): download it again") from error
        return table.to_pylist()

    def parquet_files(self, part: str) -> list[str]:
        """URIs of the Parquet files below the folder whose file name begins with ``part``, sorted.

        Raises:
            NotFoundError: there are none.
        """
        found = [info.uri for info in storage.list_objects(self.uri) if info.uri.endswith(".parquet")]
        wanted = sorted(uri for uri in found if uri.rpartition("/")[2].startswith(part))
        if not wanted:
            raise self.missing(f"{part}-*.parquet")
        return wanted

    def image_folder(self, *folders: str, embedded: Sequence[str]) -> str:
        """The one of several folders that holds the images, with its slash; "" for the benchmark's own.

        A few of the images are looked for: single ones that are missing are the index's business, all of them is a path.

        Args:
            folders: to look in, "" for the benchmark's own.
            images: names without their folder.

        Raises:
            NotFoundError: none of them is in any of the folders.
            DataError: there are no images, and so no questions.
        """
        if not embedded:
            raise DataError(f"{self._benchmark}: the files in {self.uri} hold no questions: download them again")
        few = [embedded[i] for i in sorted({0, len(embedded) // 2, len(embedded) - 1})]
        prefixes = [f"{folder}/" if folder else "" for folder in folders]
        for prefix in prefixes:
            if any(storage.exists(storage.join(self.uri, f"{prefix}{name}")) for name in few):
                return prefix
        raise self.missing(" or ".join(f"{prefix}{few[0]}" for prefix in prefixes))


def _parsed(data: bytes, uri: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise DataError(f"{uri} is not valid JSON ({error}): download it again") from error


def read_parquet(uri: str, columns: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Rows of a Parquet file; columns that it does not have are left out."""
    file = pq.ParquetFile(pa.BufferReader(storage.read_bytes(uri)))
    known = set(file.schema_arrow.names)
    return file.read(columns=[name for name in columns if name in known] if columns else None).to_pylist()
