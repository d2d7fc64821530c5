import pytest

from meteor.errors import ConversationError
from meteor.text.conversation import Conversation, Turn, find_problem, parse_conversation, parse_turns


def make_record(*values, speakers=("human", "gpt")):
    return [{"from": speakers[number % 2], "value": value} for number, value in enumerate(values)]


def parse(record, num_images=0, **kwargs):
    return parse_conversation(record, num_images=num_images, sample_id="s7", **kwargs)


@pytest.mark.parametrize(
    "value",
    ["<image>\nWhat?", "What?\n<image>", "  What? <image> ", "<image>What?", "<image> What?"],
)
def test_the_image_moves_to_the_front_of_its_turn_and_the_text_is_stripped(value):
    assert parse(make_record(value, "A cat."), 1).turns == (Turn("human", "What?", 1), Turn("gpt", "A cat.", 0))


def test_text_without_an_image_keeps_its_white_space():
    assert parse(make_record("  code:\n", " x ")).turns == (Turn("human", "  code:\n"), Turn("gpt", " x "))


def test_several_images_are_counted_where_they_are_shown():
    record = make_record("<image> and <image>?", "yes", "and <image>", "no")
    assert [turn.num_images for turn in parse(record, 3).turns] == [2, 0, 1, 0]
    assert parse(record, 3).turns[0].text == "and ?"


def test_user_and_assistant_are_read_as_human_and_gpt():
    record = make_record("hi", "ho", speakers=("user", "assistant"))
    assert [turn.role for turn in parse_turns(record, num_images=0, sample_id="s")] == ["human", "gpt"]


def test_a_leading_system_turn_is_the_system_prompt():
    record = [{"from": "system", "value": "Be brief."}, *make_record("hi", "ho")]
    assert parse(record) == Conversation((Turn("human", "hi"), Turn("gpt", "ho")), "Be brief.")


def test_a_question_without_answer_is_for_generation_only():
    assert parse(make_record("hi"), for_generation=True).turns == (Turn("human", "hi"),)
    with pytest.raises(ConversationError, match=r"'s7'.*question without an answer"):
        parse(make_record("hi"))


def test_an_empty_answer_is_an_answer():
    assert parse(make_record("hi", "")).turns[1] == Turn("gpt", "")


@pytest.mark.parametrize(
    ("record", "num_images", "reason", "words"),
    [
        ([], 0, "empty_conversation", "list of turns"),
        (None, 0, "empty_conversation", "None"),
        ("hi", 0, "empty_conversation", "'hi'"),
        ([{"from": "system", "value": "Be brief."}], 0, "empty_conversation", "no turns"),
        (["hi"], 0, "bad_turn", "turn 0"),
        ([{"from": "human", "value": 3}], 0, "bad_turn", "'value': 3"),
        ([{"from": "bard", "value": "hi"}], 0, "unknown_speaker", "'bard'"),
        ([{"from": ["human"], "value": "hi"}], 0, "bad_turn", "human"),
        ([*make_record("hi", "ho"), {"from": "system", "value": "x"}], 0, "unknown_speaker", "turn 2"),
        (make_record("hi", "ho", speakers=("gpt", "human")), 0, "turn_order", "turn 0"),
        (make_record("hi", "ho", speakers=("human", "human")), 0, "turn_order", "turn 1"),
        (make_record("<image> hi", "ho"), 0, "placeholder_without_image", "<image> without image: 1 .* 0"),
        (make_record("hi", "ho"), 1, "image_without_placeholder", "image without <image>: 1 .* 0"),
        (make_record("<image>hi", "ho"), 2, "image_without_placeholder", "2 images, 1 placeholders"),
        (make_record("hi", "see <image>"), 1, "misplaced_placeholder", "turn 1.*'gpt'"),
        ([{"from": "system", "value": "<image>"}, *make_record("hi", "ho")], 1, "misplaced_placeholder", "turn 0"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(record, num_images, reason, words):
    assert find_problem(record, num_images=num_images).reason == reason
    with pytest.raises(ConversationError, match=f"(?s)'s7'.*{words}"):
        parse(record, num_images)
