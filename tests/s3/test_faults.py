"""Storage through a proxy that breaks things: what is read is right, what is written is whole, attempts are bounded."""

import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from proxy import KINDS, Fault, Proxy, random_faults

from meteor import storage
from meteor.errors import AlreadyExistsError, StorageError
from meteor.storage import s3
from meteor.storage.client import NUM_ATTEMPTS

pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("impatient")]

SIZE_BYTES = 6 << 20


def first_times(num_times: int, fault: Fault, methods: tuple[str, ...] = ("GET", "PUT", "POST", "HEAD", "DELETE")):
    """The fault for the first requests of the methods, and none after."""
    left = [num_times]

    def schedule(method: str, path: str) -> Fault | None:
        if method not in methods or not left[0]:
            return None
        left[0] -= 1
        return fault

    return schedule


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_one_fault_of_every_kind_is_survived(through_proxy, ceph_root: str, kind: str, share: float) -> None:
    data, uri = os.urandom(SIZE_BYTES), storage.join(ceph_root, "file")
    proxy: Proxy = through_proxy(first_times(1, Fault(kind, share)))
    storage.write_bytes(uri, data)
    for read in (
        lambda: storage.read_bytes(uri),
        lambda: storage.read_range(uri, 0, SIZE_BYTES),
        lambda: storage.read_range(uri, 1 << 20, 3 << 20),
    ):
        proxy.schedule = first_times(1, Fault(kind, share))
        assert read() in data
    proxy.schedule = first_times(1, Fault(kind, share))
    assert storage.stat(uri).size_bytes == SIZE_BYTES
    proxy.schedule = first_times(1, Fault(kind, share))
    assert [info.size_bytes for info in storage.list_objects(ceph_root)] == [SIZE_BYTES]
    proxy.schedule = first_times(1, Fault(kind, share))
    storage.delete(uri)
    assert proxy.injected[kind] == 7
    assert not storage.exists(uri)


def test_a_broken_read_goes_on_where_it_broke(through_proxy, ceph_root: str) -> None:
    data, uri = os.urandom(SIZE_BYTES), storage.join(ceph_root, "file")
    storage.write_bytes(uri, data)
    # Three times in the middle of what is left.
    proxy: Proxy = through_proxy(first_times(3, Fault("cut_response", 0.5)))
    assert storage.read_range(uri, 100, SIZE_BYTES - 100) == data[100:]
    assert proxy.injected["cut_response"] == 3
    ranges = [requested for _, _, requested in proxy.requests]
    starts = [100 + (SIZE_BYTES - 100) * share // 8 for share in (0, 4, 6, 7)]
    for requested, start in zip(ranges, starts, strict=True):
        assert requested.endswith(f"-{SIZE_BYTES - 1}")
        # What a connection had not delivered when it broke is asked for again.
        assert start - (1 << 20) <= int(requested.removeprefix("bytes=").partition("-")[0]) <= start + 1


@pytest.mark.parametrize("read", [storage.read_bytes, lambda uri: storage.read_range(uri, 5, SIZE_BYTES - 5)])
def test_a_read_that_always_breaks_ends_with_the_objects_name(through_proxy, ceph_root: str, read) -> None:
    uri = storage.join(ceph_root, "file")
    storage.write_bytes(uri, bytes(SIZE_BYTES))
    proxy: Proxy = through_proxy(lambda method, path: Fault("cut_response", 0.1))
    with pytest.raises(StorageError, match=rf"^{uri}: reading broke off 5 times.*bytes into the object"):
        read(uri)
    assert len(proxy.requests) == 5


@pytest.mark.parametrize("kind", ["refuse_503", "refuse_500", "lose_answer", "cut_request"])
@pytest.mark.parametrize("write", [storage.write_bytes, storage.create_bytes])
def test_a_store_that_never_answers_well_is_given_up_with_the_objects_name(
    through_proxy, ceph_root: str, monkeypatch: pytest.MonkeyPatch, kind: str, write: Callable[[str, bytes], None]
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    uri = storage.join(ceph_root, "file")
    proxy: Proxy = through_proxy(lambda method, path: None)
    # What the store can do is tried once for each endpoint.
    storage.create_bytes(f"{uri}-before", b"x")
    proxy.requests.clear()
    proxy.schedule = lambda method, path: Fault(kind)
    with pytest.raises(StorageError, match=f"^{uri}: .*3 attempts"):
        write(uri, b"x")
    assert len(proxy.requests) == 3


def test_attempts_are_as_many_as_the_constant_says(through_proxy, ceph_root: str) -> None:
    proxy: Proxy = through_proxy(lambda method, path: Fault("refuse_500"))
    with pytest.raises(StorageError, match=rf"file: .*overloaded or down \({NUM_ATTEMPTS} attempts\)"):
        storage.read_bytes(storage.join(ceph_root, "file"))
    assert len(proxy.requests) == NUM_ATTEMPTS


def test_a_silent_store_is_given_up(through_proxy, ceph_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    proxy: Proxy = through_proxy(lambda method, path: Fault("black_hole"))
    with pytest.raises(StorageError, match=r"file: no answer from http://127.0.0.1:.* in 2 attempts"):
        storage.read_bytes(storage.join(ceph_root, "file"))
    assert len(proxy.requests) == 2


@pytest.mark.parametrize("read", [storage.read_bytes, lambda uri: storage.read_range(uri, 0, SIZE_BYTES)])
def test_an_object_replaced_in_the_middle_of_a_read_is_not_mixed(
    through_proxy, ceph_root: str, ceph_endpoint: str, read: Callable[[str], bytes]
) -> None:
    uri = storage.join(ceph_root, "file")
    storage.write_bytes(uri, bytes(SIZE_BYTES))
    writer = boto3.session.Session().client("s3", endpoint_url=ceph_endpoint)

    def replace_between(method: str, path: str) -> Fault | None:
        if len(proxy.requests) == 1:
            return Fault("cut_response", 0.5)
        writer.put_object(Bucket="bucket", Key=uri.removeprefix("s3://bucket/"), Body=b"1" * SIZE_BYTES)
        return None

    proxy: Proxy = through_proxy(replace_between)
    with pytest.raises(StorageError, match="file was replaced while it was read; read it again"):
        read(uri)
    assert read(uri) == b"1" * SIZE_BYTES


@pytest.mark.parametrize("kind", ["cut_request", "lose_answer"])
@pytest.mark.parametrize("request_number", range(5))
def test_an_upload_in_parts_survives_a_fault_of_any_request(
    through_proxy, ceph_root: str, monkeypatch: pytest.MonkeyPatch, kind: str, request_number: int
) -> None:
    # Begin, three parts, end.
    monkeypatch.setattr(s3, "_MULTIPART_BYTES", 1 << 20)
    monkeypatch.setattr(s3, "_PART_BYTES", 5 << 20)
    data, uri = os.urandom(11 << 20), storage.join(ceph_root, "file")
    numbers = iter(range(1000))
    proxy: Proxy = through_proxy(lambda method, path: Fault(kind, 0.3) if next(numbers) == request_number else None)
    storage.write_bytes(uri, data)
    assert proxy.injected[kind] == 1
    assert storage.read_bytes(uri) == data


def test_an_upload_that_fails_shows_nothing_and_what_it_left_can_be_deleted(
    through_proxy, ceph_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_MULTIPART_BYTES", 1 << 20)
    monkeypatch.setattr(s3, "_PART_BYTES", 5 << 20)
    uri = storage.join(ceph_root, "data/file")
    proxy: Proxy = through_proxy(
        lambda method, path: Fault("refuse_500") if method == "DELETE" or "=2" in path else None
    )
    with pytest.raises(StorageError, match=f"^{uri}: "):
        storage.write_bytes(uri, bytes(11 << 20))
    proxy.schedule = lambda method, path: None
    assert storage.list_objects(ceph_root) == []
    assert storage.delete_leftovers(ceph_root, 60, dry_run=False) == []
    (left,) = storage.delete_leftovers(ceph_root, -60, dry_run=False)
    assert left.startswith(f"{uri}?uploadId=")
    assert storage.delete_leftovers(ceph_root, -60, dry_run=False) == []


def test_downloads_through_random_faults_are_whole(through_proxy, ceph_root: str, tmp_path) -> None:
    data, uri = os.urandom(30 << 20), storage.join(ceph_root, "file")
    storage.write_bytes(uri, data)
    proxy: Proxy = through_proxy(random_faults(3, 0.4))
    storage.download_file(uri, str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == data
    assert proxy.injected


def test_of_racing_creators_exactly_one_wins_through_faults_that_lose_no_answer(through_proxy, ceph_root: str) -> None:
    # A lost answer can make the winner lose against itself; then nobody is told that they won.
    proxy: Proxy = through_proxy(random_faults(5, 0.3, ("delay", "cut_request", "refuse_500", "refuse_503")))
    for name in map(str, range(5)):
        uri, barrier, counts = storage.join(ceph_root, name), threading.Barrier(8), Counter[str]()

        def create(number: int, uri: str = uri, barrier=barrier, counts: Counter[str] = counts) -> None:
            barrier.wait()
            try:
                storage.create_bytes(uri, str(number).encode())
            except AlreadyExistsError:
                counts["lost"] += 1
            else:
                counts[f"won {number}"] += 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(create, range(8)))
        assert counts["lost"] == 7
        assert counts[f"won {storage.read_bytes(uri).decode()}"] == 1
    assert proxy.injected


def test_wrong_keys_are_named_as_the_cause(ceph_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="file: the store does not know these credentials"):
        storage.read_bytes(storage.join(ceph_root, "file"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StorageError, match="file: the store does not know these credentials"):
        storage.write_bytes(storage.join(ceph_root, "file"), b"x")
