"""The shared budget of bytes: never exceeded, in the order of asking, and nobody waits for ever."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from meteor.image.byte_budget import ByteBudget

TIMEOUT_S = 30


class Holder(threading.Thread):
    """A thread that holds a part until it is told to give it back."""

    def __init__(self, budget: ByteBudget, num_bytes: int) -> None:
        super().__init__(daemon=True)
        self.budget, self.num_bytes = budget, num_bytes
        self.holds, self.may_end = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with self.budget.hold(self.num_bytes):
            self.holds.set()
            assert self.may_end.wait(TIMEOUT_S)

    def end(self) -> None:
        self.may_end.set()
        self.join(TIMEOUT_S)


def wait_for_queue(budget: ByteBudget, length: int) -> None:
    """Wait until this many threads wait for their parts."""
    for _ in range(TIMEOUT_S * 1000):
        if len(budget._queue) == length:
            return
        threading.Event().wait(0.001)
    raise AssertionError(f"{len(budget._queue)} threads wait, not {length}")


def test_a_part_larger_than_the_budget_is_given_alone() -> None:
    budget = ByteBudget(10)
    small = Holder(budget, 1)
    assert small.holds.wait(TIMEOUT_S)
    large = Holder(budget, 1000)
    wait_for_queue(budget, 1)
    assert not large.holds.is_set()
    small.end()
    assert large.holds.wait(TIMEOUT_S)
    other = Holder(budget, 1)
    wait_for_queue(budget, 1)
    assert not other.holds.is_set()
    large.end()
    assert other.holds.wait(TIMEOUT_S)
    other.end()


def test_small_parts_do_not_overtake_a_large_one() -> None:
    budget = ByteBudget(10)
    first = Holder(budget, 6)
    assert first.holds.wait(TIMEOUT_S)
    large = Holder(budget, 8)
    wait_for_queue(budget, 1)
    small = Holder(budget, 1)
    wait_for_queue(budget, 2)
    assert not large.holds.is_set()
    assert not small.holds.is_set()
    first.end()
    assert large.holds.wait(TIMEOUT_S)
    assert small.holds.wait(TIMEOUT_S)
    large.end()
    small.end()


def test_a_thread_that_is_interrupted_while_it_waits_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = ByteBudget(10)

    def interrupt(predicate: Callable[[], bool]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(budget._changed, "wait_for", interrupt)
        with pytest.raises(KeyboardInterrupt), budget.hold(10):
            pass
    with budget.hold(10):
        pass


def test_an_error_in_the_block_gives_the_part_back() -> None:
    budget = ByteBudget(10)
    with pytest.raises(ValueError, match="odd"), budget.hold(10):
        raise ValueError("odd")
    with budget.hold(10):
        pass


def test_a_second_part_for_one_thread_is_an_error_and_no_deadlock() -> None:
    budget = ByteBudget(10)
    with budget.hold(1), pytest.raises(AssertionError, match="wait for itself"), budget.hold(10):
        pass


def test_many_threads_with_parts_of_all_sizes_never_exceed_the_budget_and_all_end() -> None:
    budget, lock, held, most = ByteBudget(100), threading.Lock(), 0, 0

    @contextmanager
    def counted(part: int) -> Iterator[None]:
        nonlocal held, most
        with budget.hold(part):
            with lock:
                held += min(part, 100)
                most = max(most, held)
            yield
            with lock:
                held -= min(part, 100)

    def work(seed: int) -> None:
        numbers = random.Random(seed)
        for _ in range(200):
            with counted(numbers.choice([1, 10, 60, 100, 500])):
                pass

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert not any(thread.is_alive() for thread in threads)
    assert held == 0
    assert 60 <= most <= 100
