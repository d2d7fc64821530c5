import pytest

from meteor.errors import SettingsError, TokenisationError
from meteor.text.conversation import Conversation, Turn
from meteor.text.segments import EndOfSequence, Image, SpecialToken, Text
from meteor.text.template import render

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def make_conversation(*texts, num_images=1, system=None):
    turns = [Turn("gpt" if n % 2 else "human", text, 0 if n else num_images) for n, text in enumerate(texts)]
    return Conversation(tuple(turns), system)


def flatten(segments, eos="</s>"):
    """The prompt as one string, and the labelled parts of it."""
    prompt, answers = "", []
    for segment in segments:
        if isinstance(segment, Text):
            prompt += segment.text
            answers += [segment.text[start:end] for start, end in segment.answers]
        elif isinstance(segment, Image):
            prompt += "<image>"
        elif isinstance(segment, EndOfSequence):
            prompt, answers = prompt + eos, [*answers, eos]
        else:
            prompt += segment.token
            answers += [segment.token] if segment.is_answer else []
    return prompt, answers


def test_plain_is_the_image_then_the_caption_and_its_end():
    segments = render(make_conversation("Describe it.", "A red cat."), "plain")
    assert segments == [Image(), Text("A red cat.", ((0, 10),)), EndOfSequence()]
    assert render(make_conversation("Describe it.", "A red cat."), "plain", for_generation=True) == [Image()]


@pytest.mark.parametrize(
    "conversation",
    [make_conversation("hi", "ho", num_images=0), make_conversation("a", "b", "c", "d"), make_conversation("a")],
)
def test_plain_refuses_dialogues_and_text_alone(conversation):
    with pytest.raises(TokenisationError, match="plain"):
        render(conversation, "plain")


def test_vicuna_v1_is_written_as_fastchat_writes_it():
    prompt, answers = flatten(render(make_conversation("What?", "A cat.", "Red?", "No."), "vicuna_v1"))
    assert prompt == (f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Red? ASSISTANT: No.</s>")
    assert answers == [" A cat.", "</s>", " No.", "</s>"]


def test_an_image_without_words_has_no_newline_after_it():
    assert flatten(render(make_conversation("", "A cat."), "vicuna_v1"))[0].endswith(
        "USER: <image> ASSISTANT: A cat.</s>"
    )


def test_each_of_several_images_is_followed_by_a_newline():
    prompt, _ = flatten(render(make_conversation("Same?", "Yes.", num_images=3), "vicuna_v1"))
    assert "USER: <image>\n<image>\n<image>\nSame? ASSISTANT: Yes.</s>" in prompt


def test_an_empty_answer_leaves_the_end_token_alone():
    prompt, answers = flatten(render(make_conversation("Say nothing.", "", num_images=0), "vicuna_v1"))
    assert prompt == f"{SYSTEM} USER: Say nothing. ASSISTANT:</s>"
    assert answers == ["</s>"]


def test_a_system_prompt_replaces_vicunas_own():
    conversation = make_conversation("hi", "ho", num_images=0, system="Be brief.")
    assert flatten(render(conversation, "vicuna_v1"))[0] == "Be brief. USER: hi ASSISTANT: ho</s>"


@pytest.mark.parametrize("texts", [("a", "b", "c"), ("a", "b", "c", "d")])
def test_generation_stops_where_the_last_answer_begins(texts, byte_level):
    conversation = make_conversation(*texts)
    prompt, _ = flatten(render(conversation, "vicuna_v1", for_generation=True))
    assert prompt == f"{SYSTEM} USER: <image>\na ASSISTANT: b</s>USER: c ASSISTANT:"
    chat, _ = flatten(render(conversation, "chat", tokenizer=byte_level, for_generation=True))
    assert chat.endswith("<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")


def test_chat_follows_the_tokenizers_own_template(byte_level):
    conversation = make_conversation("What?", "A cat.", "Red?", "No.", system="Be brief.")
    prompt, answers = flatten(render(conversation, "chat", tokenizer=byte_level))
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
    )
    assert answers == ["A cat.", "<|im_end|>", "No.", "<|im_end|>"]


def test_special_tokens_in_the_words_of_a_chat_stay_text(byte_level):
    conversation = make_conversation("say <|im_end|>", "well: <|im_end|>", num_images=0)
    segments = render(conversation, "chat", tokenizer=byte_level)
    assert [segment.token for segment in segments if isinstance(segment, SpecialToken)] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert Text("user\nsay <|im_end|>") in segments
    assert Text("assistant\nwell: <|im_end|>", ((10, 26),)) in segments


def test_spaces_around_an_answer_belong_to_it(make_byte_level):
    tokenizer = make_byte_level(
        "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + ' ' + "
        "eos_token }}{% endfor %}"
    )
    prompt, answers = flatten(render(make_conversation("a", "b", "c", "d"), "chat", tokenizer=tokenizer))
    assert prompt == "[INST] <image>\na [/INST] b <|im_end|>[INST] c [/INST] d <|im_end|>"
    assert answers == [" b ", "<|im_end|>", " d ", "<|im_end|>"]


def test_a_template_that_ends_no_answer_gets_the_tokenizers_end_token(make_byte_level):
    tokenizer = make_byte_level("{% for m in messages %}<|im_start|>{{ m.role + ': ' + m.content }}{% endfor %}")
    _, answers = flatten(render(make_conversation("a", "b", "c", "d"), "chat", tokenizer=tokenizer))
    assert answers == [" b", "</s>", " d", "</s>"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "{% for m in messages %}{{ m.content + m.content }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content[1:] }}{% endfor %}",
        "{{ raise_exception('only the user may speak') }}",
    ],
)
def test_a_chat_template_that_loses_a_message_is_refused(template, make_byte_level):
    with pytest.raises(TokenisationError, match="chat template"):
        render(make_conversation("a", "b"), "chat", tokenizer=make_byte_level(template))


def test_chat_needs_a_chat_template(vicuna):
    with pytest.raises(SettingsError, match="has none"):
        render(make_conversation("a", "b"), "chat", tokenizer=vicuna)
    with pytest.raises(SettingsError, match="needs the tokenizer"):
        render(make_conversation("a", "b"), "chat")


def test_an_unknown_template_is_refused():
    with pytest.raises(SettingsError, match=r"'llama_2'.*plain, vicuna_v1, chat"):
        render(make_conversation("a", "b"), "llama_2")
