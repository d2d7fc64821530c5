"""Decks that deal answers in random order but equally often, so that no answer is a good guess."""

from typing import Generic, TypeVar

import numpy as np

Card = TypeVar("Card")


class Deck(Generic[Card]):
    """Deck of cards that are dealt one by one, and shuffled again when all are dealt.

    After any number of deals the counts of two cards differ by at most 1. The majority answer therefore stays at chance even
    in a set of sixty scenes, where independent draws would make it half as frequent again.
    """

    def __init__(self, cards: tuple[Card, ...], rng: np.random.Generator) -> None:
        self._cards = cards
        self._rng = rng
        self._left: list[Card] = []

    def deal(self) -> Card:
        if not self._left:
            self._left = [self._cards[index] for index in self._rng.permutation(len(self._cards))]
        return self._left.pop()
