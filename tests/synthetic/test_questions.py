"""Questions have one right answer, the image decides it, and no answer is a good guess."""

import re
from collections import Counter, defaultdict
from itertools import islice

import numpy as np

from meteor.synthetic.questions import PairDealer, ask, ask_in_turns, ask_without_image
from meteor.synthetic.scenes import Scene
from meteor.synthetic.vocabulary import COLOURS, CORNERS, ENDS, SHAPES, SIDES, WORDS

OF_ONE_IMAGE = ("count", "colour", "shape", "text", "position")


def make_rng() -> np.random.Generator:
    return np.random.default_rng(0)


def find_one(names: tuple[str, ...], text: str) -> str:
    (found,) = [name for name in names if re.search(rf"\b{name}\b", text)]
    return found


def answer_from_boxes(scene: Scene, question_type: str, text: str) -> str:
    """The slow truth: reads the question and looks at what is drawn."""
    shapes = scene.shapes
    if question_type == "count":
        return str(len(shapes))
    if question_type == "colour":
        (thing,) = [thing for thing in shapes if thing.shape == find_one(SHAPES, text)]
        return thing.colour
    if question_type == "shape":
        (thing,) = [thing for thing in scene.objects if thing.colour == find_one(tuple(COLOURS), text)]
        return thing.shape
    if question_type == "text":
        return scene.objects[-1].word
    colour, shape = find_one(tuple(COLOURS), text), find_one(SHAPES, text)
    (thing,) = [thing for thing in shapes if (thing.colour, thing.shape) == (colour, shape)]
    across = "left" if thing.box[0] + thing.box[2] < scene.width else "right"
    down = "top" if thing.box[1] + thing.box[3] < scene.height else "bottom"
    return f"{down} {across}" if "corner" in text else across if "left" in text else down


def test_every_answer_follows_from_what_is_drawn(scenes: list[Scene]) -> None:
    rng = make_rng()
    for scene in scenes:
        questions = ask(scene, rng)
        assert [q.type for q in questions] == [t for t in OF_ONE_IMAGE if t != "text" or scene.text]
        for question in questions:
            assert question.answer == answer_from_boxes(scene, question.type, question.text)


def test_the_majority_answer_is_near_chance(scenes: list[Scene]) -> None:
    rng = make_rng()
    answers = defaultdict(Counter)
    for scene in scenes[:60]:
        for question in ask(scene, rng):
            form = next((places for places in (SIDES, ENDS) if question.answer in places), ())
            answers[question.type, form][question.answer] += 1
    num_answers = {"count": 4, "colour": len(COLOURS), "shape": len(SHAPES), "text": len(WORDS)}
    for (question_type, form), counts in answers.items():
        expected = len(form) or num_answers.get(question_type, len(CORNERS))
        assert len(counts) == expected
        assert max(counts.values()) - min(counts.values()) <= 1


def test_turns_of_one_conversation_name_no_answer_that_comes_later(scenes: list[Scene]) -> None:
    rng = make_rng()
    for scene in scenes:
        said = ""
        for question in ask_in_turns(scene, rng):
            said += f" {question.text}"
            if question.type in ("colour", "shape", "text"):
                assert not re.search(rf"\b{question.answer}\b", said)
            said += f" {question.answer}"


def test_pairs_have_the_answer_that_their_scenes_give(scenes: list[Scene]) -> None:
    forms = Counter()
    for first, second, question in islice(PairDealer(scenes[:8], make_rng()), 60):
        pair = (scenes[first], scenes[second])
        forms[question.text.split()[0], "more" in question.text, question.answer] += 1
        if "more shapes" in question.text:
            more = len(pair[0].shapes) > len(pair[1].shapes)
            assert len(pair[0].shapes) != len(pair[1].shapes)
            assert question.answer == ("first" if more else "second")
        elif question.text.startswith("Which"):
            name = re.search(r"an? (\w+ \w+),", question.text).group(1)
            shown = [name in {thing.name for thing in scene.shapes} for scene in pair]
            assert shown == [question.answer == "first", question.answer == "second"]
        else:
            shape = find_one(SHAPES, question.text)
            shown = [shape in {thing.shape for thing in scene.shapes} for scene in pair]
            assert any(shown)
            assert question.answer == ("yes" if all(shown) else "no")
    assert len(forms) == 6
    assert set(forms.values()) == {10}


def test_questions_without_an_image_are_right() -> None:
    rng = make_rng()
    sums = Counter()
    for _ in range(400):
        question = ask_without_image(rng)
        if question.text.startswith("Repeat"):
            assert question.text == f"Repeat the word {question.answer}."
        else:
            one, other = map(int, re.findall(r"\d+", question.text))
            assert one + other == int(question.answer)
            sums[question.answer] += 1
    assert len(sums) == 10
    assert max(sums.values()) < 0.2 * sum(sums.values())
