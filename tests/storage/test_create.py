"""Conditional puts: repeated when another is under way, and what is done on stores that do not know them."""

import itertools
import logging
from types import SimpleNamespace

import pytest
from botocore.exceptions import ClientError

from meteor.errors import AlreadyExistsError
from meteor.storage import s3_create

ADDRESS = {"Bucket": "bucket", "Key": "manifests/v1"}
_NUMBERS = itertools.count()


class Store:
    """A client of a store in memory that takes If-None-Match as ``behaviour`` says."""

    exceptions = SimpleNamespace(ClientError=ClientError)

    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour
        self.objects: dict[str, bytes] = {}
        self.answers: list[str] = []
        self.num_puts = 0
        # What a store can do is remembered by its endpoint.
        self.meta = SimpleNamespace(endpoint_url=f"http://store-{next(_NUMBERS)}")

    def put_object(self, *, Bucket: str, Key: str, Body: bytes, IfNoneMatch: str = "") -> None:
        self.num_puts += 1
        if self.answers and (code := self.answers.pop(0)):
            raise refusal(code)
        if IfNoneMatch and self.behaviour == "obeys" and Key in self.objects:
            raise refusal("PreconditionFailed")
        if IfNoneMatch and self.behaviour not in {"obeys", "ignores"}:
            raise refusal(self.behaviour)
        self.objects[Key] = Body

    def head_object(self, *, Bucket: str, Key: str) -> None:
        if Key not in self.objects:
            raise refusal("404")

    def delete_object(self, *, Bucket: str, Key: str) -> None:
        self.objects.pop(Key, None)


def refusal(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": "try again"}}, "PutObject")


def create(store: Store, data: bytes) -> None:
    s3_create.create(store, "s3://bucket/manifests/v1", ADDRESS, data, read=lambda: store.objects["manifests/v1"])


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that would have been made."""
    made: list[float] = []
    monkeypatch.setattr(s3_create.time, "sleep", made.append)
    return made


@pytest.mark.parametrize(
    ("behaviour", "supported"),
    [("obeys", True), ("ignores", False), ("NotImplemented", False), ("501", False), ("InvalidArgument", False)],
)
def test_what_a_store_can_do_is_tried_once(behaviour: str, supported: bool, caplog) -> None:
    store = Store(behaviour)
    with caplog.at_level(logging.WARNING):
        assert s3_create.supports_create(store, "bucket", "manifests/v1") is supported
        num_puts = store.num_puts
        assert s3_create.supports_create(store, "bucket", "elsewhere/v2") is supported
    assert store.num_puts == num_puts
    assert store.objects == {}
    assert len(caplog.records) == (not supported)
    assert all("one job at a time" in record.getMessage() for record in caplog.records)


def test_a_first_probe_that_loses_against_itself_counts_as_obeying() -> None:
    store = Store("ignores")
    store.answers = ["PreconditionFailed"]
    assert s3_create.supports_create(store, "bucket", "file")


def test_an_error_while_trying_is_not_taken_for_an_answer() -> None:
    store = Store("obeys")
    store.answers = ["AccessDenied"]
    with pytest.raises(ClientError, match="AccessDenied"):
        s3_create.supports_create(store, "bucket", "file")
    assert s3_create.supports_create(store, "bucket", "file")


@pytest.mark.parametrize("behaviour", ["obeys", "ignores", "NotImplemented"])
def test_the_first_content_stays_on_every_store(behaviour: str, pauses: list[float]) -> None:
    store = Store(behaviour)
    create(store, b"first")
    assert pauses == ([] if behaviour == "obeys" else [s3_create.SETTLE_S])
    with pytest.raises((AlreadyExistsError, ClientError), match=r"v1 exists already|PreconditionFailed"):
        create(store, b"second")
    assert store.objects == {"manifests/v1": b"first"}


def test_without_conditions_a_writer_that_was_overtaken_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("ignores")

    def overtaken(seconds: float) -> None:
        store.objects["manifests/v1"] = b"of another"

    monkeypatch.setattr(s3_create.time, "sleep", overtaken)
    with pytest.raises(AlreadyExistsError, match="another writer was faster"):
        create(store, b"mine")


def test_a_conditional_put_is_repeated_when_another_is_under_way(pauses: list[float]) -> None:
    store = Store("obeys")
    s3_create.supports_create(store, "bucket", "file")
    store.answers = ["ConditionalRequestConflict", "ConditionalRequestConflict", ""]
    create(store, b"x")
    assert store.objects == {"manifests/v1": b"x"}
    assert len(pauses) == 2
    store.answers = ["ConditionalRequestConflict"] * 10
    with pytest.raises(ClientError, match="try again"):
        create(store, b"x")
    assert len(store.answers) == 5
