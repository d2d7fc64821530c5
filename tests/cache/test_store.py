"""Reading a cache: equal content, one range, checksums, and what verify finds."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from meteor import storage
from meteor.cache import (
    FEATURE_SCHEMA,
    FeatureCache,
    QuarantineRow,
    commit,
    create_cache,
    encode_row,
    get_codec,
    pins,
    read_row,
    record_quarantine,
    write_feature_file,
)
from meteor.cache.table import table_bytes
from meteor.constants import CACHE_SCHEMA_VERSION
from meteor.errors import CacheError, CorruptPayloadError, StorageError
from meteor.features import ImageFeatures

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture
def make_cache(make_identity, tmp_path: Path) -> Callable[..., str]:
    """A cache of one committed file, and its data file."""

    def make(images: list[ImageFeatures], *, codec: str = "float16", root: str = "") -> str:
        uri = create_cache(root or str(tmp_path / "caches"), make_identity(), codec)
        write_feature_file(uri, [encode_row(image, get_codec(codec)) for image in images])
        commit(uri)
        return uri

    return make


def assert_same_image(got: ImageFeatures, image: ImageFeatures, dtype: torch.dtype) -> None:
    for name in ("image_key", "width", "height", "grid", "patch_grids", "attention_layers"):
        assert getattr(got, name) == getattr(image, name)
    for stored, original in zip(got.features, image.features, strict=True):
        assert torch.equal(stored, original.to(dtype))
    for stored, original in zip(got.cls_attention, image.cls_attention, strict=True):
        assert torch.equal(stored, original)
    assert torch.equal(got.cls, image.cls)


def ledger_rows(uri: str) -> list[dict]:
    return pq.read_table(next(Path(uri, "ledger").iterdir())).to_pylist()


def data_file(uri: str) -> Path:
    return next(Path(uri, "data").iterdir())


@pytest.mark.parametrize("codec", DTYPES)
def test_images_of_mixed_grids_come_back(make_cache, make_image, codec: str) -> None:
    images = [make_image(str(i), shape=i, layers=(-2, -4)) for i in range(7)]
    cache = FeatureCache.open(make_cache(images, codec=codec))
    assert cache.keys() == sorted(image.image_key for image in images)
    assert len(cache) == 7
    assert (cache.codec, cache.version) == (codec, 1)
    for image in images:
        assert image.image_key in cache
        assert_same_image(cache.get(image.image_key), image, DTYPES[codec])
    assert cache.verify() == []


def test_a_cache_on_s3_gives_the_same(make_cache, make_image, s3_root: str) -> None:
    images = [make_image(str(i), shape=i) for i in range(3)]
    cache = FeatureCache.open(make_cache(images, root=s3_root))
    for image in images:
        assert_same_image(cache.get(image.image_key), image, torch.float16)
    assert cache.verify() == []


def test_get_reads_one_range_and_no_more_than_the_images_bytes(make_cache, make_image, monkeypatch) -> None:
    images = [make_image(str(i), shape=i) for i in range(5)]
    cache = FeatureCache.open(make_cache(images))
    ranges, read_range_into = [], storage.read_range_into

    def counted(uri: str, start: int, buffer: bytearray) -> None:
        ranges.append(len(buffer))
        read_range_into(uri, start, buffer)

    monkeypatch.setattr(storage, "read_range_into", counted)
    monkeypatch.setattr(storage, "read_bytes", lambda uri: pytest.fail(f"reads all of {uri}"))
    for image in images:
        cache.get(image.image_key)
    payloads = [
        2 * sum(part.numel() for part in image.features)
        + 4 * sum(part.numel() for part in image.cls_attention)
        + 4 * image.cls.numel()
        for image in images
    ]
    assert len(ranges) == len(images)
    # Two page headers and value lengths lie between the three payloads.
    assert all(size <= read <= size + 150 for read, size in zip(ranges, payloads, strict=True))
    assert cache.num_bytes == sum(payloads)


def test_get_asks_storage_for_its_range_alone_and_never_for_a_footer(make_cache, make_image, monkeypatch) -> None:
    image = make_image("a", shape=2)
    cache = FeatureCache.open(make_cache([make_image("b"), image]))
    calls = []
    read_range_into = storage.read_range_into
    for name in storage.__all__ if hasattr(storage, "__all__") else dir(storage):
        if (
            callable(getattr(storage, name))
            and name not in {"join", "join_below", "absolute", "check_range"}
            and not name[0].isupper()
        ):
            monkeypatch.setattr(storage, name, lambda *args, name=name, **kwargs: pytest.fail(f"{name}{args}"))

    def counted(uri, start, buffer):
        calls.append((uri, start, len(buffer)))
        read_range_into(uri, start, buffer)

    monkeypatch.setattr(storage, "read_range_into", counted)
    assert_same_image(cache.get(image.image_key), image, torch.float16)
    monkeypatch.undo()
    [row] = [row for row in ledger_rows(cache.uri) if row["image_key"] == image.image_key]
    end = row["cls_offset"] + row["cls_size"]
    assert calls == [(str(data_file(cache.uri)), row["features_offset"], end - row["features_offset"])]
    # The footer with its length stands behind the last payload.
    assert end < data_file(cache.uri).stat().st_size - 8


@pytest.mark.parametrize("max_bytes", [1, 400, 1 << 20])
def test_prefetch_gives_what_get_gives_in_the_order_asked_for(make_cache, make_image, max_bytes: int) -> None:
    images = [make_image(str(i), shape=i, layers=(-2, -4)) for i in range(7)]
    cache = FeatureCache.open(make_cache(images))
    order = [3, 1, 1, 6, 0, 3, 5, 2]
    for got, i in zip(
        cache.prefetch((images[i].image_key for i in order), num_threads=3, max_bytes=max_bytes), order, strict=True
    ):
        assert_same_image(got, images[i], torch.float16)
    [got] = cache.prefetch([images[0].image_key], attention_layers=[-4])
    assert torch.equal(got.cls_attention[0], images[0].cls_attention[0][1:])


def test_prefetch_keeps_to_its_memory_by_the_sizes_in_the_index(make_cache, make_image, monkeypatch) -> None:
    images = [make_image(str(i)) for i in range(9)]
    cache = FeatureCache.open(make_cache(images))
    asked = []
    get = cache.get
    monkeypatch.setattr(cache, "get", lambda key, **options: asked.append(key) or get(key, **options))
    # Each has 2 x 5 patches: 120 bytes of features, 40 of attention, 24 of class token, and page headers in between.
    values = cache.prefetch((image.image_key for image in images), max_bytes=3 * 400)
    next(values)
    values.close()
    assert 3 <= len(asked) <= 1 + 3 * 400 // 184
    assert len(asked) < len(images)


def test_prefetch_complains_about_a_missing_image_when_it_is_its_turn(make_cache, make_image) -> None:
    images = [make_image(str(i)) for i in range(3)]
    cache = FeatureCache.open(make_cache(images))
    values = cache.prefetch([images[0].image_key, images[1].image_key, "0" * 64, images[2].image_key])
    assert [next(values).image_key for _ in range(2)] == [image.image_key for image in images[:2]]
    with pytest.raises(CacheError, match=r"0{64}.*run cache_features"):
        next(values)


def test_feature_tensors_stay_as_they_are_while_others_are_read(make_cache, make_image) -> None:
    images = [make_image(str(i), shape=i) for i in range(6)]
    cache = FeatureCache.open(make_cache(images))
    first = cache.get(images[0].image_key)
    parts = cache.get(images[1].image_key).features[1:]
    for image in images * 3:
        cache.get(image.image_key)
    assert_same_image(first, images[0], torch.float16)
    assert all(torch.equal(part, original.half()) for part, original in zip(parts, images[1].features[1:], strict=True))


def test_feature_tensors_share_the_memory_that_was_read(make_cache, make_image) -> None:
    image = make_image("a", shape=1)
    got = FeatureCache.open(make_cache([image])).get(image.image_key)
    pointers = [part.untyped_storage().data_ptr() for part in got.features]
    assert [pointer - pointers[0] for pointer in pointers] == [0, 2 * 6 * 9, 2 * 6 * (9 + 8)]


def test_the_file_is_plain_parquet_with_the_same_content(make_cache, make_image) -> None:
    images = [make_image(str(i), shape=i) for i in range(4)]
    parquet = pq.ParquetFile(data_file(make_cache(images)), page_checksum_verification=True)
    assert parquet.num_row_groups == 4
    table = parquet.read()
    assert table.schema.equals(FEATURE_SCHEMA)
    assert table.schema.metadata[b"codec"] == b"float16"
    for i, image in enumerate(images):
        assert_same_image(read_row(table, i, get_codec("float16")), image, torch.float16)
    for column in range(parquet.metadata.num_columns):
        chunk = parquet.metadata.row_group(0).column(column)
        assert not chunk.has_dictionary_page
        assert not chunk.is_stats_set


def test_blocks_of_many_rows_with_loose_types_are_written_too(make_identity, make_image, tmp_path: Path) -> None:
    images = [make_image(str(i), shape=i) for i in range(3)]
    rows = pa.Table.from_batches([encode_row(image, get_codec("float16")) for image in images])
    loose = pa.schema(
        [
            pa.field(field.name, pa.large_binary() if field.type == pa.binary() else field.type)
            for field in FEATURE_SCHEMA
        ]
    )
    uri = create_cache(str(tmp_path), make_identity(), "float16")
    record = write_feature_file(uri, [rows.cast(loose), encode_row(make_image("last"), get_codec("float16"))])
    assert record.num_images == 4
    assert record.size_bytes == data_file(uri).stat().st_size
    commit(uri)
    cache = FeatureCache.open(uri)
    for image in [*images, make_image("last")]:
        assert_same_image(cache.get(image.image_key), image, torch.float16)


def test_rows_of_another_codec_and_no_rows_are_refused(make_identity, make_image, tmp_path: Path) -> None:
    uri = create_cache(str(tmp_path), make_identity(), "float16")
    with pytest.raises(CacheError, match="float16"):
        write_feature_file(uri, [encode_row(make_image("a"), get_codec("float32"))])
    with pytest.raises(CacheError, match="at least one row"):
        write_feature_file(uri, [])
    with pytest.raises(CacheError, match="cls_attention"):
        write_feature_file(uri, [pa.table({"image_key": ["a"], "features": [b""]})])
    with pytest.raises(CacheError, match="no feature cache"):
        write_feature_file(str(tmp_path / "elsewhere"), [encode_row(make_image("a"), get_codec("float16"))])
    assert commit(uri) == 0


def test_a_row_changed_after_encoding_is_not_written(make_identity, make_image, tmp_path: Path) -> None:
    row = encode_row(make_image("a"), get_codec("float16")).to_pylist()[0]
    uri = create_cache(str(tmp_path), make_identity(), "float16")
    with pytest.raises(CacheError, match="checksum"):
        write_feature_file(uri, [pa.Table.from_pylist([{**row, "crc32": 1}], schema=FEATURE_SCHEMA)])
    assert storage.list_objects(storage.join(uri, "data")) == []


@pytest.mark.parametrize("payload", ["features", "cls_attention", "cls"])
def test_a_flipped_byte_is_found_by_get_and_by_verify(make_cache, make_image, payload: str) -> None:
    images = [make_image(str(i), shape=i) for i in range(3)]
    uri = make_cache(images)
    ledger = ledger_rows(uri)
    damaged = bytearray(data_file(uri).read_bytes())
    damaged[ledger[1][f"{payload}_offset"] + 3] ^= 0x10
    data_file(uri).write_bytes(damaged)
    cache = FeatureCache.open(uri)
    with pytest.raises(CorruptPayloadError, match=f"{images[1].image_key}.*{data_file(uri).name}"):
        cache.get(images[1].image_key)
    for image in (images[0], images[2]):
        assert_same_image(cache.get(image.image_key), image, torch.float16)
    problems = cache.verify()
    assert problems
    assert all(images[1].image_key in problem and data_file(uri).name in problem for problem in problems)


def test_verify_reports_files_that_are_missing_cut_or_not_what_the_index_says(make_cache, make_image) -> None:
    uri = make_cache([make_image("a"), make_image("b", shape=1)])
    cache, file = FeatureCache.open(uri), data_file(uri)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert ["2 images are lost" in problem for problem in cache.verify()] == [True]
    file.unlink()
    assert ["does not exist" in problem for problem in cache.verify()] == [True]
    with pytest.raises(StorageError, match=file.name):
        cache.get(make_image("a").image_key)
    other = make_cache([make_image("a", shape=2), make_image("b")], root=str(file.parent.parent / "other"))
    file.write_bytes(data_file(other).read_bytes())
    problems = "\n".join(cache.verify())
    assert f"image {make_image('a').image_key}: the key index says height" in problems
    assert f"image {make_image('b').image_key}: the bytes in the ranges" in problems
    file.write_bytes(whole)
    assert cache.verify() == []


def test_verify_finds_a_damaged_column_that_get_never_reads(make_cache, make_image) -> None:
    uri = make_cache([make_image("a")])
    content = bytearray(data_file(uri).read_bytes())
    content[content.index(make_image("a").image_key.encode()) + 5] ^= 1
    data_file(uri).write_bytes(content)
    cache = FeatureCache.open(uri)
    assert_same_image(cache.get(make_image("a").image_key), make_image("a"), torch.float16)
    assert len(cache.verify()) == 1


def test_a_range_that_a_damaged_index_makes_too_large_is_refused_before_memory_is_taken(make_cache, make_image) -> None:
    uri = make_cache([make_image("a")])
    keys = Path(uri, FeatureCache.open(uri).manifest.keys)
    table = pq.read_table(keys)
    sizes = pa.array([1 << 60], pa.int64())
    position = table.column_names.index("cls_size")
    storage.write_bytes(str(keys), table_bytes(table.set_column(position, table.schema.field(position), sizes)))
    cache = FeatureCache.open(uri)
    with pytest.raises(StorageError, match=r"\.parquet ends .* before the end of the range"):
        cache.get(cache.keys()[0])


def test_asking_for_attention_layers_gives_those(make_cache, make_image) -> None:
    image = make_image("a", shape=1, layers=(-2, -5))
    cache = FeatureCache.open(make_cache([image]))
    got = cache.get(image.image_key, attention_layers=[-5])
    assert torch.equal(got.cls_attention[2], image.cls_attention[2][1:])
    with pytest.raises(CacheError, match="-9"):
        cache.get(image.image_key, attention_layers=[-9])
    assert cache.keys_with_attention([-5]) == [image.image_key]
    assert cache.keys_with_attention([-5, -9]) == []


def test_a_missing_image_says_what_to_do(make_cache, make_image) -> None:
    uri = make_cache([make_image("a")])
    record_quarantine(uri, [QuarantineRow("f" * 64, "images/f.png", "truncated", "the file ends early")])
    commit(uri)
    cache = FeatureCache.open(uri)
    assert "0" * 64 not in cache
    with pytest.raises(CacheError, match=r"0{64}.*run cache_features"):
        cache.get("0" * 64)
    with pytest.raises(CacheError, match=r"quarantined.*truncated"):
        cache.get("f" * 64)


def test_a_cache_that_is_not_there_or_not_committed_says_what_to_do(make_identity, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no feature cache.*cache_features"):
        FeatureCache.open(str(tmp_path / "nothing"))
    uri = create_cache(str(tmp_path), make_identity(), "float16")
    with pytest.raises(CacheError, match="no committed version"):
        FeatureCache.open(uri)
    with pytest.raises(CacheError, match="no version 3"):
        FeatureCache.open(uri, version=3)


def test_a_cache_of_a_newer_release_is_refused(make_cache, make_image) -> None:
    uri = make_cache([make_image("a")])
    manifest = Path(uri, "manifests/v00000001.json")
    manifest.write_text(
        manifest.read_text().replace(f'"schema_version": {CACHE_SCHEMA_VERSION}', '"schema_version": 99')
    )
    with pytest.raises(CacheError, match=r"99.*newer"):
        FeatureCache.open(uri)


def test_a_pickled_cache_is_small_and_opens_the_same_version(make_cache, make_image) -> None:
    uri = make_cache([make_image(str(i)) for i in range(50)])
    pickled = pickle.dumps(FeatureCache.open(uri))
    assert len(pickled) < 500
    write_feature_file(uri, [encode_row(make_image("new"), get_codec("float16"))])
    assert commit(uri) == 2
    assert make_image("new").image_key in FeatureCache.open(uri)
    assert len(pickle.loads(pickled)) == 50


def test_the_first_pin_of_a_run_stays(make_cache, make_image) -> None:
    uri = make_cache([make_image("a")])
    assert pins(uri) == []
    pin = FeatureCache.open(uri).pin("abc", {"index_digest": "1"})
    write_feature_file(uri, [encode_row(make_image("b"), get_codec("float16"))])
    commit(uri)
    assert pin == {"index_digest": "1", "manifest_version": 1}
    assert FeatureCache.open(uri).pin("abc", {"index_digest": "2"}) == pin
    [found] = pins(uri)
    assert {**pin, "run_digest": "abc"}.items() <= found.items()


def test_a_version_that_is_deleted_while_it_is_pinned_is_not_pinned(make_identity, make_image, root: str) -> None:
    uri = create_cache(root, make_identity(), "float16")
    write_feature_file(uri, [encode_row(make_image("a"), get_codec("float16"))])
    commit(uri)
    cache = FeatureCache.open(uri)
    storage.delete(storage.join(uri, "manifests/v00000001.json"))
    with pytest.raises(CacheError, match="version 1 was deleted"):
        cache.pin("abc", {})
    assert pins(uri) == []
