"""Image files: a file beyond any image's size is a bad image, and is never read."""

import hashlib
from pathlib import Path

import pytest

from meteor.data.inspect_image import inspect_image
from meteor.errors import BadImageError, InaccessibleError
from meteor.image.files import MAX_FILE_BYTES, read_image_file
from meteor.image.pixels import PixelSettings
from pipelines.ray_parts.image_facts import read_image
from pipelines.ray_parts.slicing import read_unchanged


@pytest.fixture
def huge(tmp_path: Path) -> str:
    """A file that takes no space on disk and would not fit into memory."""
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(1 << 40)
    return str(tmp_path / "huge.png")


def test_a_file_beyond_any_images_size_is_refused_before_it_is_read(huge: str) -> None:
    with pytest.raises(InaccessibleError, match=f"huge.png has {1 << 40} bytes, and at most {MAX_FILE_BYTES}"):
        read_image_file(huge)


def test_every_reader_of_images_makes_it_a_bad_image(huge: str) -> None:
    assert read_image({"name": "huge.png", "uri": huge}, max_pixels=1000)["reason"] == "inaccessible"
    with pytest.raises(BadImageError) as caught:
        read_unchanged(huge, hashlib.sha256(b"").hexdigest())
    assert caught.value.reason == "inaccessible"
    roots = {"": str(Path(huge).parent)}
    for full in (False, True):
        assert inspect_image("huge.png", roots, PixelSettings(), full=full).reason == "inaccessible"
