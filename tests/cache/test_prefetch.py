"""Reading ahead: order, limits, errors in their place, and no thread left behind. No test waits for a clock."""

import gc
import itertools
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from meteor.cache.prefetch import MAX_IMAGES_AHEAD, read_ahead

TIMEOUT_S = 20


class Source:
    """Values that are read only when the test lets them; notes who is being read."""

    def __init__(self, *, held: bool = False, free: tuple[str, ...] = (), broken: tuple[str, ...] = ()) -> None:
        self.lock = threading.Condition()
        self.started: list[str] = []
        self.num_reading = self.most_reading = 0
        self.allowed = threading.Event()
        self.broken, self.free = broken, free
        if not held:
            self.allowed.set()

    def read(self, key: str) -> str:
        with self.lock:
            self.started.append(key)
            self.num_reading += 1
            self.most_reading = max(self.most_reading, self.num_reading)
            self.lock.notify_all()
        assert key in self.free or self.allowed.wait(TIMEOUT_S)
        with self.lock:
            self.num_reading -= 1
        if key in self.broken:
            raise KeyError(key)
        return f"value of {key}"

    def wait_until_reading(self, num_values: int) -> None:
        with self.lock:
            assert self.lock.wait_for(lambda: self.num_reading == num_values, TIMEOUT_S)


def num_threads() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


def prefetch(source, keys, *, size_bytes=lambda key: 1, threads=4, max_bytes=100):
    return read_ahead(keys, source.read, size_bytes, num_threads=threads, max_bytes=max_bytes)


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("max_bytes", [1, 2, 5, 1000])
def test_values_come_in_the_order_of_the_keys_with_repetitions(threads, max_bytes):
    keys = [str(i * i % 7) for i in range(50)]
    got = list(prefetch(Source(), keys, threads=threads, max_bytes=max_bytes))
    assert got == [f"value of {key}" for key in keys]
    assert num_threads() == 0


def test_no_keys_give_nothing():
    assert list(prefetch(Source(), [])) == []


def test_as_many_are_read_at_the_same_time_as_there_are_threads():
    source = Source(held=True)
    values = prefetch(source, map(str, range(20)), threads=4)
    first = threading.Thread(target=lambda: next(values))
    first.start()
    source.wait_until_reading(4)
    source.allowed.set()
    first.join(TIMEOUT_S)
    assert len(list(values)) == 19
    assert source.most_reading == 4


def test_keys_are_pulled_no_further_than_the_bytes_allow():
    pulled = []

    def keys():
        for i in itertools.count():
            pulled.append(i)
            yield str(i)

    values = prefetch(Source(), keys(), size_bytes=lambda key: 10, max_bytes=35)
    assert pulled == []
    for num_taken in range(1, 6):
        assert next(values) == f"value of {num_taken - 1}"
        # Handed out, three waiting, and one pulled that does not fit.
        assert len(pulled) == num_taken + 3 + 1
    values.close()


def test_one_value_larger_than_the_limit_is_read_alone():
    source, sizes = Source(), {"small": 1, "huge": 1000, "other": 1}
    waiting = []

    def size_bytes(key):
        waiting.append(key)
        return sizes[key]

    values = prefetch(source, ["small", "huge", "other"], size_bytes=size_bytes, max_bytes=10)
    assert next(values) == "value of small"
    source_started = list(source.started)
    assert "other" not in source_started
    assert next(values) == "value of huge"
    assert next(values) == "value of other"


def test_a_key_that_is_waiting_already_is_read_once():
    source = Source()
    assert list(prefetch(source, ["a", "b", "a", "a", "c"], threads=1)) == [f"value of {key}" for key in "abaac"]
    assert Counter(source.started) == {"a": 1, "b": 1, "c": 1}
    source = Source()
    assert list(prefetch(source, ["a", "b", "a"], max_bytes=1)) == [f"value of {key}" for key in "aba"]
    assert source.started == ["a", "b", "a"]


def test_one_key_for_ever_does_not_fill_the_memory():
    pulled = itertools.count()
    values = prefetch(Source(), (f"{next(pulled) * 0}" for _ in itertools.count()), size_bytes=lambda key: 0)
    assert [next(values) for _ in range(3)] == ["value of 0"] * 3
    values.close()
    assert next(pulled) <= 3 + MAX_IMAGES_AHEAD + 1


def test_an_error_comes_at_its_place_and_ends_it():
    source = Source(broken=("3",))
    values, got = prefetch(source, map(str, range(20))), []
    with pytest.raises(KeyError, match="3"):
        got.extend(values)
    assert got == [f"value of {i}" for i in range(3)]
    assert list(values) == []
    assert num_threads() == 0


@pytest.mark.parametrize("end", ["close", "forget"])
def test_stopping_early_leaves_no_thread_and_reads_nothing_more(end):
    source = Source()
    values = prefetch(source, map(str, itertools.count()), threads=2)
    next(values)
    assert num_threads() > 0
    if end == "close":
        values.close()
    else:
        del values
        gc.collect()
    assert num_threads() == 0
    num_started = len(source.started)
    assert num_started <= 1 + 100 + 1
    assert source.num_reading == 0


def test_stopping_early_waits_only_for_what_has_begun(monkeypatch):
    source, shutdown = Source(held=True, free=("0",)), ThreadPoolExecutor.shutdown

    def until_waiting(pool, wait=True, **options):
        if wait:
            source.allowed.set()
        shutdown(pool, wait, **options)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", until_waiting)
    values = prefetch(source, map(str, range(100)), threads=2)
    next(values)
    source.wait_until_reading(2)
    values.close()
    assert sorted(source.started) == ["0", "1", "2"]


def test_an_error_of_the_keys_comes_out_too():
    def keys():
        yield "a"
        raise RuntimeError("no more plan")

    with pytest.raises(RuntimeError, match="no more plan"):
        list(prefetch(Source(), keys()))
    assert num_threads() == 0
