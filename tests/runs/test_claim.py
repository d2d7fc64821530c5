"""The newest start of a command owns its folder, and older ones notice."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from meteor import storage
from meteor.errors import DamagedError, SupersededError
from meteor.runs import claim as claim_module
from meteor.runs.claim import Claim


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request, tmp_path):
    return str(tmp_path / "stage") if request.param == "disk" else f"{request.getfixturevalue('s3_root')}/stage"


def test_a_newer_start_ends_an_older_one(folder):
    older = Claim.take(folder, job="raysubmit_1")
    older.check()
    newer = Claim.take(folder, job="raysubmit_2")
    newer.check()
    assert (older.number, newer.number, older.is_current()) == (0, 1, False)
    with pytest.raises(
        SupersededError, match=rf"{folder} was taken over by a newer start \(process \d+ on .*raysubmit_2"
    ):
        older.check()


def test_workers_of_a_start_leave_its_own_claim_alone(folder):
    command = Claim.take(folder)
    first = command.for_workers()
    assert first.is_current()
    second = command.for_workers()
    # Workers that were lost sight of do not count when new ones have started.
    assert (command.is_current(), first.is_current(), second.is_current()) == (True, False, True)


def test_a_newer_start_ends_the_workers_of_an_older_one(folder):
    older = Claim.take(folder)
    workers = older.for_workers()
    Claim.take(folder)
    assert not workers.is_current()
    with pytest.raises(SupersededError):
        older.for_workers()


def test_of_several_starts_at_once_exactly_one_is_current(folder):
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: Claim.take(folder), range(8)))
    assert sorted(claim.number for claim in claims) == list(range(8))
    assert [claim.number for claim in claims if claim.is_current()] == [7]


def test_a_put_that_is_repeated_after_a_lost_answer_is_one_claim(folder, monkeypatch):
    original = storage.create_bytes

    def twice(uri, data):
        original(uri, data)
        original(uri, data)

    monkeypatch.setattr(claim_module.storage, "create_bytes", twice)
    claim = Claim.take(folder)
    assert (claim.number, claim.is_current()) == (0, True)


def test_a_damaged_claim_is_named(tmp_path):
    claim = Claim.take(str(tmp_path))
    (tmp_path / "attempts" / "0001.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"attempts/0001.json carries no checksum"):
        claim.check()
