"""Conditional puts: repeated when another is under way; stores that do not obey them are refused."""

import itertools
from types import SimpleNamespace

import pytest
from botocore.exceptions import ClientError

from meteor.errors import StorageError
from meteor.storage import s3_create

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

    def delete_object(self, *, Bucket: str, Key: str) -> None:
        self.objects.pop(Key, None)


def refusal(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": "try again"}}, "PutObject")


def create(store: Store, data: bytes, key: str = "manifests/v1") -> None:
    s3_create.create(store, {"Bucket": "bucket", "Key": key}, data)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that would have been made."""
    made: list[float] = []
    monkeypatch.setattr(s3_create.time, "sleep", made.append)
    return made


@pytest.mark.parametrize("behaviour", ["ignores", "NotImplemented", "501", "InvalidArgument"])
def test_a_store_without_conditional_puts_is_refused_and_left_as_it_was(behaviour: str) -> None:
    store = Store(behaviour)
    for _ in range(2):
        with pytest.raises(
            StorageError, match=r"^s3://bucket/manifests/v1: .*http://store-.*If-None-Match.*use a store"
        ):
            create(store, b"first")
    assert store.objects == {}


def test_what_a_store_can_do_is_tried_once_for_a_bucket() -> None:
    store = Store("obeys")
    create(store, b"first")
    num_puts = store.num_puts
    create(store, b"other", "elsewhere/v2")
    assert store.num_puts == num_puts + 1
    assert store.objects == {"manifests/v1": b"first", "elsewhere/v2": b"other"}


def test_the_first_content_stays() -> None:
    store = Store("obeys")
    create(store, b"first")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        create(store, b"second")
    assert store.objects == {"manifests/v1": b"first"}


def test_a_first_probe_that_loses_against_itself_counts_as_obeying() -> None:
    store = Store("ignores")
    store.answers = ["PreconditionFailed"]
    create(store, b"first")


def test_an_error_while_trying_is_not_taken_for_an_answer() -> None:
    store = Store("obeys")
    store.answers = ["AccessDenied"]
    with pytest.raises(ClientError, match="AccessDenied"):
        create(store, b"first")
    create(store, b"first")


def test_a_conditional_put_is_repeated_when_another_is_under_way(pauses: list[float]) -> None:
    store = Store("obeys")
    create(store, b"", "file")
    store.objects.clear()
    store.answers = ["ConditionalRequestConflict", "ConditionalRequestConflict", ""]
    create(store, b"x")
    assert store.objects == {"manifests/v1": b"x"}
    assert len(pauses) == 2
    store.answers = ["ConditionalRequestConflict"] * 10
    with pytest.raises(ClientError, match="try again"):
        create(store, b"x")
    assert len(store.answers) == 5
