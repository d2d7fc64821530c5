"""Records read block by block are those of the whole document, and its errors too."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meteor.data.records import UnreadableRecord, read_records
from meteor.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def read(path, text, block_bytes):
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return list(read_records(str(path), block_bytes=block_bytes))


def truth(text):
    """What json.loads says: the records, or line, column and message of the error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return f"line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})."


@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 20])
@settings(max_examples=60, deadline=None)
@given(records=st.lists(VALUES, max_size=5), indent=st.sampled_from([None, 2]), ascii_only=st.booleans())
def test_records_are_those_of_the_whole_document(tmp_path_factory, block_bytes, records, indent, ascii_only):
    folder = tmp_path_factory.mktemp("records")
    text = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
    assert read(folder / "s.json", text, block_bytes) == records
    lines = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    assert read(folder / "s.jsonl", lines, block_bytes) == records


@pytest.mark.parametrize("block_bytes", [1, 30, 1 << 20])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_errors_are_those_of_the_whole_document(tmp_path_factory, block_bytes, data):
    text = json.dumps(data.draw(st.lists(VALUES, min_size=1, max_size=3)), indent=1)
    place = data.draw(st.integers(0, len(text) - 1))
    broken = (
        text[:place]
        + data.draw(st.sampled_from(["", ",", "]", '"', "}", "x", "\n", "\\u12", "-", "tru"]))
        + text[place + data.draw(st.integers(0, 3)) :]
    )
    expected = truth(broken)
    path = tmp_path_factory.mktemp("records") / "s.json"
    if isinstance(expected, list):
        assert read(path, broken, block_bytes) == expected
        return
    with pytest.raises(DataError) as caught:
        read(path, broken, block_bytes)
    if isinstance(expected, str):
        assert str(caught.value) == f"{path}, {expected}"
    else:
        assert f"holds a {type(expected).__name__}" in str(caught.value)


def test_bytes_that_are_not_text_are_named_by_their_position(tmp_path):
    path = tmp_path / "s.json"
    path.write_bytes(b'["\xc3\xa4", "\xff"]')
    for block_bytes in (1, 3, 100):
        with pytest.raises(DataError, match="UTF-8 text \\(byte 8: invalid start byte"):
            list(read_records(str(path), block_bytes=block_bytes))
    path.write_bytes(b'\xef\xbb\xbf["\xc3')
    with pytest.raises(DataError, match="byte 5: unexpected end of data"):
        list(read_records(str(path), block_bytes=1))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("block_bytes", [100, 1 << 20])
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("[" * 100_000 + '"]}\\"{"' + "]" * 100_000, "nested too deeply"),
        ('{"a": ' * 10_000 + "1" + "}" * 10_000, "nested too deeply"),
        ("9" * 5000, "digits"),
        ('{"id": [' + "9" * 5000 + "]}", "digits"),
    ],
)
def test_a_value_beyond_the_parsers_limits_is_named_by_its_line_and_costs_no_other(
    tmp_path, name, block_bytes, value, problem
):
    good = '{"id": 1}'
    text = f"[{good},\n{value},\n{good}\n]" if name == "a.json" else f"{good}\n{value}\n{good}\n"
    (tmp_path / name).write_text(text)
    first, bad, last = read_records(str(tmp_path / name), block_bytes=block_bytes)
    assert first == last == {"id": 1}
    assert isinstance(bad, UnreadableRecord)
    assert re.search(rf"{name}, line 2, column 1: .*{problem}", bad.message)


def test_a_deep_value_that_never_ends_is_a_damaged_file(tmp_path):
    (tmp_path / "a.json").write_text("[1,\n" + "[" * 100_000)
    with pytest.raises(DataError, match=r"a\.json, line 2, column 1: .*Unterminated"):
        list(read_records(str(tmp_path / "a.json")))


def test_a_line_that_is_not_json_costs_no_other_and_a_line_that_is_cut_off_is_a_damaged_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n{"id" 2}\r\n\n{"id": 3}')
    first, bad, last = read_records(str(path))
    assert (first, last) == ({"id": 1}, {"id": 3})
    assert f"{path}, line 2, column 7: not valid JSON" in bad.message
    path.write_text(path.read_text()[:-1])
    with pytest.raises(DataError, match=r"a\.jsonl, line 4, column 9"):
        list(read_records(str(path)))
