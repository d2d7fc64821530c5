"""Deals answers in random order but equally often, so that no answer is a good guess."""

from typing import Generic, TypeVar

import numpy as np

Card = TypeVar("Card")


class Deck(Generic[Card]):
    """Cards dealt one by one; a new shuffled deck follows when one is used up.

    After any number of deals the counts of two cards differ by one at most, so the majority answer stays at chance
    even in a set of sixty scenes, where independent draws would give it half as much again.
    """

    def __init__(self, cards: tuple[Card, ...], rng: np.random.Generator) -> None:
        self._cards = cards
        self._rng = rng
        self._left: list[Card] = []

    def deal(self) -> Card:
        if not self._left:
            self._left = [self._cards[index] for index in self._rng.permutation(len(self._cards))]
        return self._left.pop()
