"""The clean-up beside writers that are at work: whatever they finish stays whole, in any order of events."""

import time

import pytest

from meteor import storage
from meteor.cache import FeatureCache, commit, create_cache, encode_row, get_codec, write_feature_file
from meteor.cache.upkeep.deletion import Deleter
from meteor.cache.upkeep.gc import plan_gc, run_gc
from meteor.cache.upkeep.gc_plan import UNFINISHED, UNNAMED


@pytest.fixture
def anywhere(make_identity, root: str) -> str:
    return create_cache(root, make_identity(), "float16")


def write(cache_uri: str, image) -> str:
    return write_feature_file(cache_uri, [encode_row(image, get_codec("float16"))]).file


def collect(cache_uri: str) -> None:
    """The clean-up that spares no age; an hour is added, as an object store dates files in whole seconds."""
    plan = plan_gc(cache_uri, older_than_s=0, now_s=storage.now_s(cache_uri) + 3600)
    run_gc(plan)


def before(monkeypatch, name: str, action, *, matching: str, after: bool = False) -> None:
    """Run ``action`` once before or after the first call of a storage function whose URI contains a text."""
    real = getattr(storage, name)

    def call(uri: str, *arguments):
        is_it = matching in uri
        if is_it:
            monkeypatch.setattr(storage, name, real)
        if is_it and not after:
            action()
        result = real(uri, *arguments)
        if is_it and after:
            action()
        return result

    monkeypatch.setattr(storage, name, call)


def assert_whole(cache_uri: str, image) -> None:
    commit(cache_uri)
    cache = FeatureCache.open(cache_uri)
    assert cache.keys() == [image.image_key]
    assert cache.verify() == []


def test_a_clock_25_hours_ahead_deletes_nothing_of_a_live_writer(
    make_identity, make_image, tmp_path, monkeypatch
) -> None:
    # On disk alone: the mock of S3 runs in this process, with its clock.
    cache_uri = create_cache(str(tmp_path), make_identity(), "float16")

    def collect_by_a_wrong_clock() -> None:
        real = time.time
        with monkeypatch.context() as wrong:
            wrong.setattr(time, "time", lambda: real() + 25 * 3600)
            plan = plan_gc(cache_uri)
            assert plan.is_empty
            run_gc(plan)

    # Between the data file and its record, and between the tables of a version and its manifest.
    before(monkeypatch, "write_bytes", collect_by_a_wrong_clock, matching="/ledger/features-")
    write(cache_uri, make_image("a"))
    before(monkeypatch, "create_bytes", collect_by_a_wrong_clock, matching="/manifests/")
    assert_whole(cache_uri, make_image("a"))


@pytest.mark.parametrize(
    ("function", "matching"),
    [("write_bytes", "/ledger/features-"), ("create_bytes", "/manifests/")],
    ids=["data file", "tables"],
)
def test_a_writer_notices_that_its_file_went_before_it_counted(
    anywhere, make_image, monkeypatch, function, matching
) -> None:
    deleted: list[str] = []

    def collect_all() -> None:
        files = {info.uri for info in storage.list_objects(anywhere)}
        collect(anywhere)
        deleted.extend(files - {info.uri for info in storage.list_objects(anywhere)})

    before(monkeypatch, function, collect_all, matching=matching)
    write(anywhere, make_image("a"))
    assert_whole(anywhere, make_image("a"))
    assert len(deleted) == (1 if matching.startswith("/ledger") else 2)


@pytest.mark.parametrize("moment", ["before the look", "before the deletion", "after the deletion"])
@pytest.mark.parametrize("kind", ["data file", "tables"])
def test_the_clean_up_notices_that_a_file_counts_by_now(anywhere, make_image, monkeypatch, kind, moment) -> None:
    image = make_image("a")
    file = write(anywhere, image)
    record = storage.join(anywhere, file.replace("data/", "ledger/features-"))
    if kind == "data file":
        published = record
    else:
        commit(anywhere)
        published = storage.join(anywhere, "manifests/v00000001.json")
        file = FeatureCache.open(anywhere).manifest.keys
    content = storage.read_bytes(published)
    storage.delete(published)
    plan = plan_gc(anywhere, older_than_s=0, now_s=storage.now_s(anywhere) + 3600)
    assert [deletion.reason for deletion in plan.deletions if deletion.file == file] == [
        UNFINISHED if kind == "data file" else UNNAMED
    ]

    def publish() -> None:
        storage.write_bytes(published, content)

    if moment == "before the look":
        publish()
    else:
        before(monkeypatch, "delete", publish, matching=file, after=moment == "after the deletion")
    deleter = Deleter(anywhere, 0)
    is_gone = [deleter.delete(deletion) for deletion in plan.deletions if deletion.file == file]
    assert is_gone == [False]
    assert_whole(anywhere, image)


def test_partial_files_younger_than_an_hour_stay_whatever_age_is_asked_for(anywhere) -> None:
    partial = storage.join(anywhere, "data/.partial-123")
    storage.write_bytes(partial, b"half")
    run_gc(plan_gc(anywhere, older_than_s=0))
    assert storage.read_bytes(partial) == b"half"
