"""Damaged bytes are found: in JSON that carries its own checksum, and in folders with a list of checksums."""

import json

import pytest

from meteor import storage
from meteor.checksums import (
    CHECKSUMS,
    Checksum,
    check_folder,
    checksum,
    damaged_files,
    intact,
    read_checked_json,
    read_checksums,
    write_checked_json,
    write_checksums,
    write_list,
)
from meteor.errors import DamagedError, MeteorError, NotFoundError

CONTENT = {"name": "a", "numbers": (1, 2.5, 1e-300), "by_count": {10: "ten", 9: "nine"}, "text": "ü 漢\u2028"}


def test_values_come_back_as_json_has_them(tmp_path):
    write_checked_json(f"{tmp_path}/a.json", CONTENT)
    assert read_checked_json(f"{tmp_path}/a.json") == json.loads(json.dumps(CONTENT))


def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    file = tmp_path / "a.json"
    write_checked_json(str(file), CONTENT)
    intact, expected = file.read_bytes(), read_checked_json(str(file))
    num_refused = 0
    for position in range(len(intact)):
        for bit in range(8):
            damaged = bytearray(intact)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                assert read_checked_json(str(file)) == expected, (position, bit)
            except DamagedError:
                num_refused += 1
    # The others turn white space into other white space.
    assert num_refused > 0.95 * 8 * len(intact)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"\0" * 100, b'{"crc32": "00000000"}', b'{"crc32": NaN, "a": NaN}']
)
def test_other_content_is_refused(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DamagedError, match=r"a\.json"):
        read_checked_json(f"{tmp_path}/a.json")


def make_folder(root):
    for name, data in {"a.bin": b"a" * 5000, "below/b.txt": b"b", "empty": b"", "mine.json": b"{}"}.items():
        storage.write_bytes(f"{root}/{name}", data)
    write_checksums(str(root), leave_out=lambda name: name == "mine.json", about="x")
    return root


def test_a_folder_as_it_was_written_passes(tmp_path):
    make_folder(tmp_path)
    content = read_checksums(str(tmp_path))
    assert sorted(content["files"]) == ["a.bin", "below/b.txt", "empty"]
    assert content["about"] == "x"
    assert damaged_files(str(tmp_path), content) == {}
    check_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.bin", b"a" * 4999 + b"b", "does not match its checksum"),
        ("a.bin", b"a" * 4000, "has 4,000 bytes instead of 5,000"),
        ("below/b.txt", b"", "has 0 bytes instead of 1"),
        ("empty", b"\0", "has 1 bytes instead of 0"),
    ],
)
def test_a_changed_file_is_named(tmp_path, name, data, problem):
    make_folder(tmp_path)
    storage.write_bytes(f"{tmp_path}/{name}", data)
    assert damaged_files(str(tmp_path), read_checksums(str(tmp_path))) == {name: problem}
    with pytest.raises(DamagedError, match=f"1 of its files .* {name} {problem}"):
        check_folder(str(tmp_path))
    check_folder(str(tmp_path), ["mine.json"])


def test_a_missing_file_is_named(tmp_path):
    make_folder(tmp_path)
    storage.delete(f"{tmp_path}/a.bin")
    with pytest.raises(DamagedError, match=r"a.bin is missing"):
        check_folder(str(tmp_path))


def test_files_that_are_not_listed_may_change(tmp_path):
    make_folder(tmp_path)
    storage.write_bytes(f"{tmp_path}/mine.json", b"[]")
    storage.write_bytes(f"{tmp_path}/new.txt", b"new")
    check_folder(str(tmp_path))


def test_a_folder_without_a_list_is_not_checked(tmp_path):
    check_folder(str(tmp_path))


def test_a_list_with_names_outside_the_folder_is_refused(tmp_path):
    write_checked_json(f"{tmp_path}/{CHECKSUMS}", {"files": {"../a": {"size_bytes": 1, "crc32": "0"}}})
    with pytest.raises(MeteorError, match="leads out of its folder"):
        check_folder(str(tmp_path))


def test_the_checksum_of_a_large_file_is_that_of_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("meteor.checksums._BLOCK_BYTES", 7)
    (tmp_path / "a").write_bytes(b"123456789" * 3)
    assert checksum(f"{tmp_path}/a").size_bytes == 27
    (tmp_path / "a").write_bytes(b"123456789")
    assert checksum(f"{tmp_path}/a") == Checksum(9, "cbf43926")  # the check value of CRC-32
    with pytest.raises(NotFoundError):
        checksum(f"{tmp_path}/nothing")


def test_a_list_of_files_that_can_be_made_again_is_whole_or_nothing(tmp_path, caplog):
    uri = f"{tmp_path}/records.json"
    assert intact(uri) is None
    assert not caplog.records
    storage.write_bytes(f"{tmp_path}/a.bin", b"abc")
    write_list(uri, ["a.bin"], problems=["one"])
    assert intact(uri)["problems"] == ["one"]
    for damage in (f"{tmp_path}/a.bin", uri):
        whole = storage.read_bytes(damage)
        storage.write_bytes(damage, whole[:-2] + b"xx")
        assert intact(uri) is None
        assert "made again, as some are damaged" in caplog.records.pop().message
        storage.write_bytes(damage, whole)
    storage.delete(f"{tmp_path}/a.bin")
    assert intact(uri) is None
