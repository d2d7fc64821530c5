"""Publishing: nothing half is ever seen, nothing finished is lost, every image has one winner. On disk and on S3."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from meteor import storage
from meteor.cache import (
    FeatureCache,
    ImageFeatures,
    QuarantineRow,
    commit,
    create_cache,
    encode_row,
    get_codec,
    record_quarantine,
    write_feature_file,
)
from meteor.errors import AlreadyExistsError, CacheError, StorageError


@pytest.fixture
def cache_uri(make_identity, root: str) -> str:
    return create_cache(root, make_identity(), "float16")


def write(cache_uri: str, *images: ImageFeatures) -> None:
    write_feature_file(cache_uri, [encode_row(image, get_codec("float16")) for image in images])


def fail_on(monkeypatch: pytest.MonkeyPatch, function: str, part: str) -> None:
    """Let the writes of files under one folder fail from here on, as if the process had died before them."""
    real = getattr(storage, function)

    def failing(uri: str, data: bytes) -> None:
        if f"/{part}/" in uri:
            raise StorageError(f"{uri}: the plug was pulled")
        real(uri, data)

    monkeypatch.setattr(storage, function, failing)


def test_a_data_file_without_its_ledger_record_does_not_count(cache_uri, make_image, monkeypatch) -> None:
    with monkeypatch.context() as broken:
        fail_on(broken, "write_bytes", "ledger")
        with pytest.raises(StorageError, match="plug"):
            write(cache_uri, make_image("a"))
    assert len(storage.list_objects(storage.join(cache_uri, "data"))) == 1
    assert commit(cache_uri) == 0
    write(cache_uri, make_image("b"))
    assert commit(cache_uri) == 1
    assert FeatureCache.open(cache_uri).keys() == [make_image("b").image_key]


def test_a_finished_file_is_adopted_after_a_crash_before_the_manifest(cache_uri, make_image, monkeypatch) -> None:
    write(cache_uri, make_image("a"))
    with monkeypatch.context() as broken:
        fail_on(broken, "create_bytes", "manifests")
        with pytest.raises(StorageError, match="plug"):
            commit(cache_uri)
    with pytest.raises(CacheError, match="no committed version"):
        FeatureCache.open(cache_uri)
    assert commit(cache_uri) == 1
    assert FeatureCache.open(cache_uri).keys() == [make_image("a").image_key]


def test_versions_grow_and_old_ones_stay_readable(cache_uri, make_image) -> None:
    write(cache_uri, make_image("a"), make_image("b", shape=1))
    assert commit(cache_uri) == 1
    assert commit(cache_uri) == 1
    write(cache_uri, make_image("c"))
    assert commit(cache_uri) == 2
    assert len(FeatureCache.open(cache_uri)) == 3
    assert len(FeatureCache.open(cache_uri, version=1)) == 2
    assert len(storage.list_objects(storage.join(cache_uri, "manifests"))) == 2


def files_read(cache: FeatureCache, image: ImageFeatures, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    files, read_range_into = [], storage.read_range_into

    def noting(uri: str, start: int, buffer: bytearray) -> None:
        files.append(uri)
        read_range_into(uri, start, buffer)

    with monkeypatch.context() as noted:
        noted.setattr(storage, "read_range_into", noting)
        cache.get(image.image_key)
    return files


def test_of_two_rows_for_one_image_the_committed_one_stays(cache_uri, make_image, monkeypatch) -> None:
    write(cache_uri, make_image("a"), make_image("a"))
    commit(cache_uri)
    first = FeatureCache.open(cache_uri)
    assert (len(first), first.manifest.num_shadowed) == (1, 1)
    write(cache_uri, make_image("a"), make_image("b"))
    commit(cache_uri)
    second = FeatureCache.open(cache_uri)
    assert (len(second), second.manifest.num_shadowed) == (2, 2)
    assert files_read(first, make_image("a"), monkeypatch) == files_read(second, make_image("a"), monkeypatch)
    assert second.verify() == []


def test_a_row_with_the_attention_of_more_layers_replaces_one_with_fewer(cache_uri, make_image) -> None:
    write(cache_uri, make_image("a", layers=(-2,)), make_image("b", layers=(-2, -5)))
    commit(cache_uri)
    write(cache_uri, make_image("a", layers=(-5, -2)), make_image("b", layers=(-5, -7)))
    commit(cache_uri)
    cache = FeatureCache.open(cache_uri)
    assert cache.get(make_image("a").image_key).attention_layers == (-5, -2)
    assert cache.get(make_image("b").image_key).attention_layers == (-2, -5)
    assert cache.manifest.num_shadowed == 2


def test_writers_that_commit_at_once_lose_nothing_and_double_nothing(cache_uri, make_image) -> None:
    num_writers, num_files = 4, 3
    barrier = threading.Barrier(num_writers)

    def work(writer: int) -> int:
        version = 0
        for file in range(num_files):
            write(cache_uri, make_image("everyone's"), make_image(f"{writer}-{file}", shape=file))
            barrier.wait()
            version = commit(cache_uri)
        return version

    with ThreadPoolExecutor(num_writers) as pool:
        versions = list(pool.map(work, range(num_writers)))
    cache = FeatureCache.open(cache_uri)
    images = {make_image(f"{writer}-{file}") for writer in range(num_writers) for file in range(num_files)}
    assert cache.keys() == sorted({make_image("everyone's").image_key, *(image.image_key for image in images)})
    assert cache.version == max(versions)
    assert cache.manifest.num_shadowed == num_writers * num_files - 1
    published = [info.uri for info in storage.list_objects(storage.join(cache_uri, "manifests"))]
    assert len(published) == cache.version
    assert cache.verify() == []


def test_a_put_that_succeeded_but_reported_a_lost_race_commits_once(cache_uri, make_image, monkeypatch) -> None:
    write(cache_uri, make_image("a"))
    real = storage.create_bytes

    def answer_lost(uri: str, data: bytes) -> None:
        real(uri, data)
        raise AlreadyExistsError(uri)

    monkeypatch.setattr(storage, "create_bytes", answer_lost)
    assert commit(cache_uri) == 1
    assert FeatureCache.open(cache_uri).keys() == [make_image("a").image_key]


def test_a_writer_that_always_loses_gives_up_with_an_error(cache_uri, make_image, monkeypatch) -> None:
    write(cache_uri, make_image("a"))

    def lose(uri: str, data: bytes) -> None:
        raise AlreadyExistsError(uri)

    monkeypatch.setattr(storage, "create_bytes", lose)
    monkeypatch.setattr("meteor.cache.table._MAX_PAUSE_S", 0.0)
    monkeypatch.setattr("meteor.cache.table._MAX_PUBLISH_ATTEMPTS", 3)
    with pytest.raises(CacheError, match="3 attempts"):
        commit(cache_uri)


def test_quarantined_pictures_are_merged_and_leave_once_encoded(cache_uri, make_image) -> None:
    key = make_image("late").image_key
    record_quarantine(cache_uri, [])
    assert commit(cache_uri) == 0
    record_quarantine(
        cache_uri,
        [
            QuarantineRow(key, "images/late.png", "non_finite_features", "NaN"),
            QuarantineRow("", "images/gone.png", "empty", "0 bytes"),
        ],
    )
    assert commit(cache_uri) == 1
    assert FeatureCache.open(cache_uri).quarantined() == {key: "non_finite_features", "images/gone.png": "empty"}
    assert len(FeatureCache.open(cache_uri)) == 0
    record_quarantine(cache_uri, [QuarantineRow("", "images/gone.png", "truncated", "half")])
    write(cache_uri, make_image("late"))
    assert commit(cache_uri) == 2
    cache = FeatureCache.open(cache_uri)
    assert cache.quarantined() == {"images/gone.png": "truncated"}
    assert cache.quarantine() == [QuarantineRow("", "images/gone.png", "truncated", "half")]
    assert cache.keys() == [key]
    record_quarantine(cache_uri, [QuarantineRow(key, "images/late.png", "truncated", "again")])
    commit(cache_uri)
    assert FeatureCache.open(cache_uri).quarantined() == {"images/gone.png": "truncated"}
