"""Files written piece by piece appear whole or not at all; parts of them are read, locally and on S3."""

import pytest

from meteor import storage
from meteor.errors import NotFoundError
from meteor.storage.files import new_file, open_file


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_root")


def write(uri, content, error=None):
    with new_file(uri) as path, open(path, "wb") as file:
        file.write(content)
        if error:
            raise error


def test_a_file_appears_when_it_is_whole(root):
    uri = storage.join(root, "folder/file")
    with pytest.raises(KeyboardInterrupt):
        write(uri, b"half", KeyboardInterrupt())
    assert storage.list_objects(root) == []
    write(uri, b"0123456789")
    write(uri, b"abcdefghij")
    assert [info.uri for info in storage.list_objects(root)] == [storage.absolute(uri)]
    assert storage.read_bytes(uri) == b"abcdefghij"


def test_parts_of_a_file_are_read(root):
    uri = storage.join(root, "file")
    write(uri, bytes(range(256)) * 10_000)
    with open_file(uri) as file:
        assert file.size() == 2_560_000
        file.seek(2_559_998)
        assert file.read(10) == b"\xfe\xff"
        file.seek(1_000_003)
        assert file.read(3) == bytes([67, 68, 69])
    with pytest.raises(NotFoundError):
        open_file(storage.join(root, "none"))
