"""Scenes are balanced, unambiguous, and a function of the seed."""

from collections import Counter
from itertools import combinations, islice

import numpy as np
import pytest

from meteor.errors import SettingsError
from meteor.synthetic.deck import Deck
from meteor.synthetic.layout import Wanted, place_all
from meteor.synthetic.scenes import Scene, SceneDealer, SceneObject
from meteor.synthetic.streams import random_stream
from meteor.synthetic.vocabulary import MAX_COUNT, TEXT, place_bounds, places_of


def test_a_deck_deals_every_card_equally_often_give_or_take_one() -> None:
    deck = Deck(("a", "b", "c"), np.random.default_rng(0))
    counts = Counter(deck.deal() for _ in range(100))
    assert sorted(counts.values()) == [33, 33, 34]


def test_two_cards_in_a_row_do_not_foretell_the_third() -> None:
    deck = Deck(("a", "b", "c"), np.random.default_rng(0))
    rounds = {tuple(deck.deal() for _ in range(3)) for _ in range(200)}
    assert len(rounds) == 6


def test_streams_differ_by_seed_name_and_index() -> None:
    draws = [
        random_stream(*arguments).integers(2**62) for arguments in ((0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a"))
    ]
    assert draws[0] == draws[4]
    assert len(set(draws)) == 4


def test_the_same_seed_gives_the_same_scenes_and_another_gives_others(scenes: list[Scene]) -> None:
    assert list(islice(SceneDealer(random_stream(7, "test")), 20)) == scenes[:20]
    assert list(islice(SceneDealer(random_stream(8, "test")), 20)) != scenes[:20]


def test_boxes_lie_inside_the_image_and_apart(scenes: list[Scene]) -> None:
    for scene in scenes:
        for thing in scene.objects:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= scene.width
            assert 0 <= y0 < y1 <= scene.height
        for one, other in combinations(scene.objects, 2):
            apart_x = one.box[2] < other.box[0] or other.box[2] < one.box[0]
            apart_y = one.box[3] < other.box[1] or other.box[3] < one.box[1]
            assert apart_x or apart_y


def test_a_shape_lies_wholly_in_the_place_it_is_said_to_be_in(scenes: list[Scene]) -> None:
    for scene in scenes:
        for thing in scene.shapes:
            x0, y0, x1, y1 = place_bounds(thing.place, scene.width, scene.height)
            assert x0 <= thing.box[0] < thing.box[2] <= x1
            assert y0 <= thing.box[1] < thing.box[3] <= y1


def test_places_divide_the_image_by_its_shape() -> None:
    assert places_of(900, 220) == ("left", "right")
    assert places_of(150, 400) == ("top", "bottom")
    assert len(places_of(320, 240)) == 4
    assert place_bounds("top right", 100, 60) == (50, 0, 100, 30)
    assert place_bounds("bottom", 100, 300) == (0, 150, 100, 300)


def test_the_first_shape_and_the_second_colour_occur_once(scenes: list[Scene]) -> None:
    for scene in scenes:
        shapes = scene.shapes
        second = shapes[min(1, len(shapes) - 1)]
        assert [thing.shape for thing in shapes].count(shapes[0].shape) == 1
        assert [thing.colour for thing in scene.objects].count(second.colour) == 1


def test_sizes_cover_panoramas_portraits_small_and_large_images(scenes: list[Scene]) -> None:
    ratios = [scene.width / scene.height for scene in scenes]
    areas = [scene.width * scene.height for scene in scenes]
    assert max(ratios) > 4
    assert min(ratios) < 0.4
    assert min(areas) < 112 * 112
    assert max(areas) > 672 * 1008


def test_counts_and_texts_are_dealt_evenly(scenes: list[Scene]) -> None:
    counts = Counter(len(scene.shapes) for scene in scenes)
    assert counts == dict.fromkeys(range(1, MAX_COUNT + 1), len(scenes) // MAX_COUNT)
    assert sum(scene.text is not None for scene in scenes) == len(scenes) // 2


def test_a_caption_names_every_thing_and_its_place() -> None:
    things = (
        SceneObject("circle", "orange", (0, 0, 9, 9), "top left"),
        SceneObject("star", "blue", (20, 20, 29, 29), "bottom right"),
        SceneObject(TEXT, "black", (0, 20, 9, 29), word="sun", font_px=14),
    )
    assert Scene(40, 30, things, 0).caption == (
        "an orange circle at the top left and a blue star at the bottom right, with the text sun"
    )
    side = SceneObject("square", "red", (0, 0, 9, 9), "left")
    assert Scene(90, 20, (side,), 0).caption == "a red square on the left"


def test_an_image_too_small_for_its_things_is_refused() -> None:
    wanted = [Wanted("text", "black", word="cat")] * 6
    with pytest.raises(SettingsError, match="6 objects do not fit into 40 x 40"):
        place_all(np.random.default_rng(0), 40, 40, wanted, (0.3, 0.5))
