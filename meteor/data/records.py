"""Records of a JSON file, read block by block, so that a large file is never in memory as a whole."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from meteor import storage
from meteor.errors import DataError
from meteor.image.inside import map_images, record_fragment

_BLOCK_BYTES = 8 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
# A comma and the first character of the next value, which is no end of a list.
_NEXT = re.compile(r"[ \t\n\r]*,[ \t\n\r]*(?=[^ \t\n\r\]])")
# An error this close to the end of the window may only mean that a word or an escape continues in the next block.
_LONGEST_WORD = 16
# Texts, and the brackets outside of them.
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_SCALAR = re.compile(r"[^ \t\n\r,\]}]*")
# Only a record with this text can hold an image.
_DATA_URI = '"data:'

# Makes the name of an image inside the file from the fragment of its URI.
NameImage = Callable[[str], str]


@dataclass(frozen=True)
class UnreadableRecord:
    """A record that the parser refuses, in a file whose other records can be read.

    Attributes:
        message: description of the problem, with the line and column.
    """

    message: str


def read_records(uri: str, *, block_bytes: int = _BLOCK_BYTES, name_image: NameImage | None = None) -> Iterator[Any]:
    """Parse a ``.json`` file (one list) or a ``.jsonl`` file (one record per line), one record after the other.

    Args:
        uri: local path or s3://.
        block_bytes: bytes per read.
        name_image: function from the fragment of an image's URI (see `meteor.image.inside`) to the name that takes the place
            of a data: URI; None leaves data: URIs as they are.

    Yields:
        The records as Python values, in the order of the file. `UnreadableRecord` stands for a line of ``.jsonl`` that is
        not JSON, and for a value beyond Python's limits: nested too deeply, or a number of too many digits.

    Raises:
        NotFoundError: the file does not exist.
        DataError: the file is not UTF-8, not JSON (with the line and column), not a list of records, or ends in the middle
            of a record.
    """
    text = _Text(uri, block_bytes, name_image)
    if uri.endswith(".jsonl"):
        yield from _lines(text)
    elif uri.endswith(".json"):
        yield from _items(text)
    else:
        raise DataError(f"{uri} is neither .json nor .jsonl: give LLaVA's annotation file in one of these forms.")


# Python's limits for nesting and for the digits of a whole number.
_BEYOND_LIMITS = (RecursionError, ValueError)


def _limit(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


class _Text:
    """A window on the text of a file, with a cursor.

    Attributes:
        uri: the file's URI.
        text: the part of the file in memory.
        at: position of the cursor in ``text``.
        is_complete: whether the window reaches the end of the file.
    """

    def __init__(self, uri: str, block_bytes: int, name_image: NameImage | None) -> None:
        self.uri = uri
        self._name_image = name_image
        # Position in ``text`` whose offset in the file is known, and that offset in bytes.
        self._counted, self._offset = 0, 0
        self.text = ""
        self.at = 0
        self._size_bytes = storage.stat(uri).size_bytes
        self.is_complete = self._size_bytes == 0
        self._block_bytes = block_bytes
        self._num_read = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._values = json.JSONDecoder()
        # Line and column of the window's first character, for error messages.
        self._line, self._column = 1, 1

    def more(self) -> None:
        """Forget the text before the cursor and read the next block.

        The block is at least as long as the remaining text. A value that does not fit is parsed again with at least twice
        the text, so the total time stays linear in its length.
        """
        self._line, self._column = self._place(self.at)
        self._offset_of(self.at)
        self.text, self.at, self._counted = self.text[self.at :], 0, 0
        start = self._num_read
        size = min(max(self._block_bytes, len(self.text)), self._size_bytes - start)
        num_undecoded = len(self._utf8.getstate()[0])
        data = storage.read_range(self.uri, start, size)
        if not start and data.startswith(codecs.BOM_UTF8):
            self._offset = len(codecs.BOM_UTF8)
        self._num_read += size
        self.is_complete = self._num_read == self._size_bytes
        try:
            self.text += self._utf8.decode(data, self.is_complete)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.uri} is not UTF-8 text (byte {start - num_undecoded + error.start}: {error.reason}): is it an "
                "annotation file?"
            ) from error

    def peek(self) -> str:
        """Move the cursor over white space and return the character there, "" at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text) or self.is_complete:
                return self.text[self.at : self.at + 1]
            self.more()

    def value(self) -> Any:
        """Parse the JSON value at the cursor and move behind it; a value beyond Python's limits is only passed over."""
        while True:
            try:
                value, end = self._values.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.is_complete or not self._may_continue(error):
                    raise self.error(error.msg, error.pos) from error
            except _BEYOND_LIMITS as error:
                problem = UnreadableRecord(str(self.error(_limit(error))))
                self._skip()
                return problem
            else:
                # A number that ends with the window may continue in the next block.
                if end + _LONGEST_WORD < len(self.text) or self.is_complete:
                    start, self.at = self.at, end
                    return self.with_named_images(value, start, end)
            self.more()

    def with_named_images(self, value: Any, start: int, end: int) -> Any:
        """Return the value that was parsed between two positions with names instead of data: URIs."""
        name_image = self._name_image
        if name_image is None or self.text.find(_DATA_URI, start, end) < 0:
            return value
        offset, size_bytes = self._offset_of(start), len(self.text[start:end].encode())
        positions = count()

        def name(image: Any) -> Any:
            position = next(positions)
            return name_image(record_fragment(offset, size_bytes, position)) if isinstance(image, str) else image

        try:
            return map_images(value, name)
        except _BEYOND_LIMITS as error:
            return UnreadableRecord(str(self.error(_limit(error), start)))

    def _offset_of(self, position: int) -> int:
        """Return the offset in the file of a position that is not before the last one."""
        self._offset += len(self.text[self._counted : position].encode())
        self._counted = position
        return self._offset

    def _skip(self) -> None:
        """Move behind the value at the cursor without parsing it."""
        while (end := self._end()) is None or (end == len(self.text) and not self.is_complete):
            if self.is_complete:
                raise self.error("Unterminated list or object")
            self.more()
        self.at = end

    def _end(self) -> int | None:
        """Return the position behind the value at the cursor; None if the window ends before it."""
        if self.text[self.at] not in "[{":
            match = _SCALAR.match(self.text, self.at)
            assert match is not None
            return match.end()
        depth = 0
        for match in _BRACKETS.finditer(self.text, self.at):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
            if not depth:
                return match.end()
        return None

    def line(self) -> str | None:
        """Return the rest of the line at the cursor; None at the end of the file."""
        # splitlines() would also split at other separators (U+2028), which JSON strings may contain unescaped.
        while (end := self.text.find("\n", self.at)) < 0 and not self.is_complete:
            self.more()
        if self.at > len(self.text):
            return None
        return self.text[self.at :] if end < 0 else self.text[self.at : end]

    def error(self, message: str, position: int | None = None) -> DataError:
        """Make a syntax error for a position in ``text``, by default the cursor's."""
        line, column = self._place(self.at if position is None else position)
        return DataError(f"{self.uri}, line {line}, column {column}: not valid JSON ({message}).")

    def _may_continue(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos + _LONGEST_WORD >= len(self.text)

    def _place(self, position: int) -> tuple[int, int]:
        num_lines = self.text.count("\n", 0, position)
        column = position - self.text.rfind("\n", 0, position) if num_lines else self._column + position
        return self._line + num_lines, column


def _items(text: _Text) -> Iterator[Any]:
    if text.peek() != "[":
        _refuse(text)
    text.at += 1
    while text.peek() != "]":
        yield text.value()
        # Nearly always the next value is in the window, and one look finds it.
        if match := _NEXT.match(text.text, text.at):
            text.at = match.end()
            continue
        separator = text.peek()
        if separator == ",":
            text.at += 1
            if text.peek() == "]":
                raise text.error("Expecting value")
        elif separator != "]":
            raise text.error("Expecting ',' delimiter")
    text.at += 1
    if text.peek():
        raise text.error("Extra data")


def _refuse(text: _Text) -> None:
    value = text.value()
    if text.peek():
        raise text.error("Extra data")
    raise DataError(
        f"{text.uri} holds a {type(value).__name__}, not a list of records: give LLaVA's form, or .jsonl with one "
        f"record per line."
    )


def _lines(text: _Text) -> Iterator[Any]:
    while (line := text.line()) is not None:
        if line.strip():
            yield _line(text, line)
        text.at += len(line) + 1


def _line(text: _Text, line: str) -> Any:
    try:
        return text.with_named_images(json.loads(line), text.at, text.at + len(line))
    except json.JSONDecodeError as error:
        problem = text.error(error.msg, text.at + error.pos)
        # Without its end, the last line is what an interrupted download leaves.
        if text.at + len(line) >= len(text.text):
            raise problem from error
        return UnreadableRecord(str(problem))
    except _BEYOND_LIMITS as error:
        return UnreadableRecord(str(text.error(_limit(error))))
