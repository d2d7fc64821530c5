"""Batches of conversations get the tokens that each gets alone, on odd texts and all templates."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meteor.constants import IGNORE_INDEX
from meteor.errors import TokenisationError
from meteor.text.batches import BatchTokeniser
from meteor.text.conversation import Conversation, Turn
from meteor.text.encoder import text_encoder
from meteor.text.tokens import tokenise
from meteor.text.words import WordEncoder

PIECES = (
    *(
        "a",
        "the",
        "cats",
        "red table",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        "▁",
        "▁▁",
        "\0",
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
    ),
    *(
        "<image>",
        "<|im_end|>",
        "USER:",
        "ASSISTANT:",
        "é",
        "日本",
        "😀",
        "👩‍👩‍👧",
        "\u2028",
        "\u00a0",
        "1,234",
        ".",
        "?!",
    ),
)
TEXTS = (
    st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8)
    .map("".join)
    .filter(lambda text: not any("\ud800" <= letter <= "\udfff" for letter in text))
)


@st.composite
def conversations(draw):
    num_rounds = draw(st.integers(1, 3))
    turns = []
    for _ in range(num_rounds):
        num_images = draw(st.sampled_from([0, 0, 1, 2]))
        question = draw(TEXTS)
        # The text of a turn with images is stripped when it is read.
        turns += [Turn("human", question.strip() if num_images else question, num_images), Turn("gpt", draw(TEXTS))]
    return Conversation(tuple(turns), draw(st.none() | TEXTS))


def one_by_one(conversation, tokenizer, template):
    """Ids, labels and turns; or the words of the error after the sample's name."""
    try:
        sample = tokenise(conversation, tokenizer, template, sample_id="x")
    except TokenisationError as error:
        return str(error).removeprefix("Sample 'x'")
    return sample.input_ids, [label != IGNORE_INDEX for label in sample.labels], sample.turns


def as_rows(batch):
    columns = batch.input_ids, batch.is_answer, batch.turns
    spans = zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
    rows = [tuple(column[start:end].tolist() for column in columns) for start, end in spans]
    return [problem or row for problem, row in zip(batch.problems, rows, strict=True)]


@pytest.mark.parametrize(
    ("tokenizer_name", "template"),
    [
        ("vicuna", "vicuna_v1"),
        ("vicuna", "plain"),
        ("vicuna_with_chat", "chat"),
        ("legacy_vicuna", "vicuna_v1"),
        ("byte_level", "vicuna_v1"),
        ("byte_level", "chat"),
    ],
)
@settings(max_examples=60, deadline=None)
@given(batch=st.lists(conversations(), max_size=4))
def test_a_batch_gets_the_tokens_of_its_conversations(request, tokenizer_name, template, batch):
    tokenizer = request.getfixturevalue(tokenizer_name)
    expected = [one_by_one(one, tokenizer, template) for one in batch]
    assert as_rows(BatchTokeniser(tokenizer, template)(batch)) == expected


@pytest.fixture(scope="session")
def vicuna_with_chat(make_vicuna, byte_level, tmp_path_factory):
    from meteor.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(make_vicuna(tmp_path_factory.mktemp("text") / "chat", legacy=False))
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}:\n{{ message.content }}</s>\n{% endfor %}"
    )
    return tokenizer


def describe(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())


def test_words_are_encoded_apart_where_that_is_exact(vicuna, legacy_vicuna, byte_level):
    assert WordEncoder.of(describe(vicuna)) is not None
    assert WordEncoder.of(describe(legacy_vicuna)) is not None
    assert WordEncoder.of(describe(byte_level)) is None
    assert text_encoder(vicuna, len(vicuna)).words is not None


def change_vocabulary(description):
    description["model"]["vocab"]["a▁b"] = len(description["model"]["vocab"])


@pytest.mark.parametrize(
    "change",
    [
        change_vocabulary,
        lambda description: description["model"].update(ignore_merges=True),
        lambda description: description["model"].update(byte_fallback=False),
        lambda description: description["model"]["vocab"].pop("<0x0A>"),
        lambda description: description["added_tokens"][0].update(special=False),
        lambda description: description.update(normalizer={"type": "NFKC"}),
        lambda description: description["pre_tokenizer"].update(split=True),
    ],
)
def test_where_a_word_may_depend_on_its_neighbours_none_is_encoded_apart(vicuna, change):
    description = describe(vicuna)
    change(description)
    assert WordEncoder.of(description) is None


def test_a_text_is_cut_only_between_letters_that_no_piece_holds_side_by_side(vicuna):
    words = text_encoder(vicuna, len(vicuna)).words
    assert words.can_cut(":", " ")
    assert words.can_cut("\n", "a")
    assert not words.can_cut(" ", "t")  # "▁the"
    assert not words.can_cut("h", "e")


def test_words_are_forgotten_when_there_are_too_many(vicuna, monkeypatch):
    words = WordEncoder(describe(vicuna))
    texts = ["▁a cats", "▁table is red", "▁a table"]
    expected = [words.encode([text])[0].tolist() for text in texts]
    monkeypatch.setattr("meteor.text.words._MAX_WORDS", 1)
    assert [words.encode([text])[0].tolist() for text in texts] == expected
    assert len(words._places) <= 3
