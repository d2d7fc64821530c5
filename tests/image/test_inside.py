"""Images inside data files: their URIs, and reading them in any order."""

import base64
import random
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
from data_forms import IMAGE, hub_image, parquet_bytes

from meteor.errors import BadImageError, NotFoundError
from meteor.image import parquet_cells
from meteor.image.files import read_image_file, read_image_start
from meteor.image.inside import (
    Place,
    cell_fragment,
    decode_data_uri,
    file_of,
    find_place,
    map_images,
    member_fragment,
    record_fragment,
)


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        (f"s3://b/x.parquet{cell_fragment(7, 'images', 2)}", Place("s3://b/x.parquet", 7, 0, "images", 2)),
        (f"/d/x.tar{member_fragment(512, 30)}", Place("/d/x.tar", 512, 30)),
        (f"/d/x.jsonl{record_fragment(512, 30, 1)}", Place("/d/x.jsonl", 512, 30, "", 1)),
        (f"/d/x.json{record_fragment(512, 30, 1)}", Place("/d/x.json", 512, 30, "", 1)),
        ("/d/a#1.jpg", None),
        ("/d/x.parquet", None),
        ("/d/x.parquet#1.jpg", None),
        (f"/d/x.tar{cell_fragment(7, 'images', 2)}", None),
        (f"/d/x.parquet{member_fragment(512, 30)}", None),
        (f"/d/x.json{member_fragment(512, 30)}", None),
    ],
)
def test_a_uri_names_a_place_inside_a_file_or_a_file(uri, place):
    assert find_place(uri) == place
    assert file_of(uri) == (uri if place is None else place.file)


def test_only_images_are_replaced():
    struct, uri = {"bytes": b"1", "path": None}, "data:image/png;base64,eA=="
    value = {
        "messages": [{"image": struct}, {"image_url": {"url": uri}}, {"text": uri}],
        "images": [b"2", "a.png", uri],
    }
    found = []
    changed = map_images(value, lambda image: found.append(image) or len(found))
    assert found == [struct, uri, b"2", uri]
    assert changed == {
        "messages": [{"image": 1}, {"image_url": {"url": 2}}, {"text": uri}],
        "images": [3, "a.png", 4],
    }


def test_data_uris_are_decoded():
    text = base64.b64encode(b"\xff\x00x").decode()
    assert decode_data_uri(f"data:image/png;base64,{text}") == b"\xff\x00x"
    assert decode_data_uri(f"DATA:;BASE64,{text[:2]}\n{text[2:]}") == b"\xff\x00x"
    assert decode_data_uri("data:image/x,a%20b") == b"a b"
    for damaged in ("data:image/png;base64", "data:;base64,A", "data:;base64,*"):
        with pytest.raises(BadImageError, match="no valid data: URI"):
            decode_data_uri(damaged)


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """A file of 40 rows in row groups of 15 and windows of about 4; the content of each row."""
    monkeypatch.setattr(parquet_cells, "_WINDOW_BYTES", 4000)
    contents = [random.Random(row).randbytes(1000) for row in range(40)]
    images = pa.array([[hub_image(content)] for content in contents], pa.list_(IMAGE))
    (tmp_path / "x.parquet").write_bytes(parquet_bytes(pa.table({"images": images}), 15))
    return [f"{tmp_path}/x.parquet{cell_fragment(row, 'images', 0)}" for row in range(40)], contents


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_rows_are_read_in_any_order_and_by_threads(cells, order):
    uris, contents = cells
    rows = {"forward": range(40), "backward": range(39, -1, -1), "random": random.Random(0).sample(range(40), 40)}[
        order
    ]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read_image_file, [uris[row] for row in rows])) == [contents[row] for row in rows]
    assert read_image_start(uris[7], 10) == contents[7][:10]


def test_reading_in_order_decodes_each_row_once(cells, monkeypatch):
    uris, _ = cells
    num_rows = 0
    real = parquet_cells._Cells._begin

    def begin(self, group):
        nonlocal num_rows
        real(self, group)
        num_rows += self._file.metadata.row_group(group).num_rows

    monkeypatch.setattr(parquet_cells._Cells, "_begin", begin)
    # Threads are a few rows apart.
    shuffled = [row for start in range(0, 40, 4) for row in random.Random(start).sample(range(start, start + 4), 4)]
    for row in shuffled:
        read_image_file(uris[row])
    assert num_rows == 40


def test_a_file_that_is_replaced_is_read_anew_and_one_that_shrinks_has_lost_rows(cells, tmp_path):
    uris, contents = cells
    assert read_image_file(uris[3]) == contents[3]
    images = pa.array([[hub_image(b"new")]] * 3, pa.list_(IMAGE))
    (tmp_path / "x.parquet").unlink()
    (tmp_path / "x.parquet").write_bytes(parquet_bytes(pa.table({"images": images})))
    assert read_image_file(uris[2]) == b"new"
    for uri, reason in ((uris[3], "changed"), (uris[0][:-1] + "1", "changed")):
        with pytest.raises(BadImageError) as caught:
            read_image_file(uri)
        assert caught.value.reason == reason
    (tmp_path / "x.parquet").write_bytes(b"no Parquet")
    with pytest.raises(BadImageError, match="cannot be read"):
        read_image_file(uris[0])
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(NotFoundError):
        read_image_file(uris[0])


def test_a_member_of_an_archive_that_was_cut_is_truncated(tmp_path):
    (tmp_path / "x.tar").write_bytes(bytes(600))
    with pytest.raises(BadImageError) as caught:
        read_image_file(f"{tmp_path}/x.tar{member_fragment(512, 100)}")
    assert caught.value.reason == "truncated"


def test_a_damaged_row_group_costs_no_row_of_another(cells, tmp_path):
    uris, contents = cells
    whole = (tmp_path / "x.parquet").read_bytes()
    # The length of the image, which then leads out of its page.
    place = whole.index(contents[19][:100])
    (tmp_path / "x.parquet").write_bytes(whole[: place - 4] + b"\xff" * 4 + whole[place:])
    reasons = set()
    for row in [*range(40), *range(39, -1, -1)]:
        try:
            assert read_image_file(uris[row]) == contents[row]
        except BadImageError as error:
            assert 15 <= row < 30
            reasons.add(error.reason)
    assert reasons == {"unreadable"}
