"""Chat templates of known models: prompts are prefixes of what is trained on, and answers end as the models end them."""

import datetime

import pytest
from published import PUBLISHED

from meteor.errors import SettingsError, TokenisationError
from meteor.text.chat import chat_template
from meteor.text.conversation import Conversation, Turn
from meteor.text.jinja import chat_jinja
from meteor.text.segments import EndOfSequence, Image, SpecialToken, Text
from meteor.text.template import render
from meteor.text.tokens import check_template, tokenise


@pytest.fixture(scope="module", params=PUBLISHED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def published(name):
    return PUBLISHED[name]


@pytest.fixture(scope="module")
def tokenizer(published, make_byte_level):
    end, *others = published.tokens
    tokenizer = make_byte_level(published.template, eos_token=end, bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": others})
    return tokenizer


def make_conversation(*texts, num_images=0, system=None):
    turns = [Turn("gpt" if n % 2 else "human", text, 0 if n else num_images) for n, text in enumerate(texts)]
    return Conversation(tuple(turns), system)


def as_text(segments, tokenizer):
    shown = {Image: lambda _: "<image>", EndOfSequence: lambda _: tokenizer.eos_token, SpecialToken: lambda s: s.token}
    return "".join(s.text if isinstance(s, Text) else shown[type(s)](s) for s in segments)


def messages_of(conversation):
    system = [{"role": "system", "content": conversation.system}] if conversation.system is not None else []
    return system + [
        {"role": "user" if turn.role == "human" else "assistant", "content": "<image>" * turn.num_images + turn.text}
        for turn in conversation.turns
    ]


def test_a_question_with_its_answer_is_written_as_the_template_writes_it(published, tokenizer):
    conversation = make_conversation("Q", "An answer.")
    text = as_text(render(conversation, "chat", tokenizer=tokenizer), tokenizer)
    space = " " if text[len(published.prompt)] == " " else ""
    assert text == f"{published.prompt}{space}An answer.{published.after_answer}"
    own = tokenizer.apply_chat_template(messages_of(conversation), tokenize=False, date_string="26 Jul 2024")
    assert text == own.replace(f"{datetime.date.today()}", "2024-07-26")


@pytest.mark.parametrize("num_turns", [1, 3, 5])
def test_every_prompt_of_a_conversation_is_a_prefix_of_the_trained_tokens(tokenizer, num_turns):
    texts = ["One?", " first ", "Two?", "", "Three?", "</think> third"]
    whole = tokenise(make_conversation(*texts), tokenizer, "chat")
    prompt = tokenise(make_conversation(*texts[:num_turns]), tokenizer, "chat", for_generation=True)
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    # The answer begins right behind the prompt.
    assert whole.labels[len(prompt.input_ids)] == whole.input_ids[len(prompt.input_ids)]


def test_every_answer_is_taught_to_end_with_the_models_end_token(published, tokenizer):
    sample = tokenise(make_conversation("Q", "one", "R", "two"), tokenizer, "chat")
    end = tokenizer.convert_tokens_to_ids(published.end_token)
    assert sample.labels.count(end) == 2
    assert (chat_template(tokenizer).end_token or tokenizer.eos_token) == published.end_token


def test_answers_before_the_last_are_followed_by_the_next_question(published, tokenizer):
    conversation = make_conversation("Q", "one", "R", "two")
    text = as_text(render(conversation, "chat", tokenizer=tokenizer), tokenizer)
    own = tokenizer.apply_chat_template(messages_of(conversation), tokenize=False, date_string="26 Jul 2024")
    # gpt-oss ends answers before the last one as it ends questions; here all answers end as the last one.
    expected = own.split("one")[1].split("R")[0].replace("<|end|><|start|>user", "<|return|><|start|>user")
    assert text.split("one")[1].split("R")[0] == expected


def test_a_last_answer_without_an_end_ends_as_those_before_it(make_byte_level):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{{ '<|im_end|>\n' if not loop.last }}"
        "{% endfor %}"
    )
    tokenizer = make_byte_level(template, eos_token="<|endoftext|>")
    text = as_text(render(make_conversation("Q", "one", "R", "two"), "chat", tokenizer=tokenizer), tokenizer)
    messages = "user\nQ", "assistant\none", "user\nR", "assistant\ntwo"
    assert text == "\n".join(f"<|im_start|>{message}<|im_end|>" for message in messages)


def test_the_check_at_the_start_passes(tokenizer):
    for template in ("chat", "vicuna_v1", "plain"):
        check_template(tokenizer, template)


def test_the_check_at_the_start_names_a_template_that_does_not_fit(make_byte_level):
    tokenizer = make_byte_level("{{ messages[0].content }}")
    with pytest.raises(SettingsError, match="'chat' does not fit this tokenizer"):
        check_template(tokenizer, "chat")
    # A word of the template that fuses with the first word of an answer would be no prefix.
    fusing = make_byte_level("{% for m in messages %}{{ m.role[:1] + m.content }}{% endfor %}")
    fusing.add_tokens(["aA"])
    with pytest.raises(SettingsError, match="differ from the text before"):
        check_template(fusing, "chat")


def test_prompts_do_not_depend_on_the_date(make_byte_level):
    published = PUBLISHED["llama 3.2"]
    tokenizer = make_byte_level(published.template, eos_token=published.tokens[0], bos_token="<s>")
    today = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    assert datetime.datetime.now().strftime("%Y") in today
    assert "26 Jul 2024" in as_text(render(make_conversation("Q", "A"), "chat", tokenizer=tokenizer), tokenizer)


def test_a_system_prompt_stands_first_or_is_refused(name, tokenizer):
    conversation = make_conversation("Q", "one", "R", "two", system="Be brief.")
    if name == "gemma 2":
        with pytest.raises(TokenisationError, match="no system prompt"):
            render(conversation, "chat", tokenizer=tokenizer)
        return
    text = as_text(render(conversation, "chat", tokenizer=tokenizer), tokenizer)
    assert text.index("Be brief.") < text.index("Q")


@pytest.mark.parametrize("template", ["chat", "vicuna_v1"])
@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("texts", [("Q",), ("Q", "A"), ("Q", " A", "", "", " R ", "B")])
def test_the_finished_models_template_writes_what_training_wrote(tokenizer, template, num_images, texts):
    conversation = make_conversation(*texts, num_images=num_images)
    asks = len(texts) % 2 == 1
    finished = chat_jinja(template, tokenizer)
    text = tokenizer.apply_chat_template(
        messages_of(conversation), chat_template=finished, tokenize=False, add_generation_prompt=asks
    )
    bos = tokenizer.bos_token if template == "vicuna_v1" else ""
    assert text == bos + as_text(render(conversation, template, tokenizer=tokenizer, for_generation=asks), tokenizer)
    parts = [
        {
            "role": message["role"],
            "content": [{"type": "image"}] * turn.num_images + [{"type": "text", "text": turn.text}],
        }
        for message, turn in zip(messages_of(conversation), conversation.turns, strict=True)
    ]
    assert text == tokenizer.apply_chat_template(
        parts, chat_template=finished, tokenize=False, add_generation_prompt=asks
    )


def test_the_finished_models_template_reads_as_the_one_it_was_made_from(tokenizer):
    own, before = tokenizer.chat_template, chat_template(tokenizer)
    tokenizer.chat_template = chat_jinja("chat", tokenizer)
    try:
        assert chat_template(tokenizer) == before
        assert chat_jinja("chat", tokenizer) == tokenizer.chat_template
    finally:
        tokenizer.chat_template = own
