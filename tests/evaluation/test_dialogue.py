"""A dialogue with a model of random weights."""

import pytest
import torch

from meteor.errors import BadImageError, ConversationError, NotFoundError
from meteor.evaluation.answer import Answerer
from meteor.evaluation.dialogue import Dialogue


@pytest.fixture(scope="module")
def answerer(finished_model):
    return Answerer(finished_model, device="cpu", dtype=torch.float32)


@pytest.fixture
def files(make_image, png, tmp_path):
    paths = []
    for i, size in enumerate([(112, 56), (56, 56)]):
        (tmp_path / f"{i}.png").write_bytes(png(make_image(*size, seed=i)))
        paths.append(str(tmp_path / f"{i}.png"))
    return paths


def test_what_is_streamed_is_the_answer(answerer, files, ask):
    dialogue, pieces = Dialogue(answerer), []
    shown = dialogue.show(files[0])
    assert shown.image.size == (112, 56)
    reply = dialogue.ask("what is it?", max_new_tokens=12, on_text=pieces.append)
    assert "".join(pieces).strip() == reply.text != ""
    assert len(pieces) > 1
    assert 1 < reply.num_tokens <= 12
    assert reply.tokens_per_s > 0
    expected = ask(answerer.processor, "what is it?", [shown.image])
    tokens = answerer.model.generate(**expected, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=2)
    assert answerer.decode(tokens[:, expected["input_ids"].shape[1] :]) == [reply.text]


def test_later_questions_know_what_was_said_and_shown(answerer, files):
    dialogue = Dialogue(answerer)
    dialogue.show(files[0])
    first = dialogue.ask("what?", max_new_tokens=4)
    dialogue.show(files[1])
    second = dialogue.ask("and this?", max_new_tokens=4)
    assert [(turn.role, turn.num_images) for turn in dialogue.turns] == [
        ("human", 1),
        ("gpt", 0),
        ("human", 1),
        ("gpt", 0),
    ]
    assert second.num_prompt_tokens > first.num_prompt_tokens
    assert Dialogue(answerer).ask("and this?", max_new_tokens=4).num_prompt_tokens < first.num_prompt_tokens


def test_an_image_shown_twice_is_encoded_once(answerer, files):
    dialogue = Dialogue(answerer)
    assert dialogue.show(files[0]).features is dialogue.show(files[0]).features


def test_what_cannot_be_shown_or_asked_is_said_and_changes_nothing(answerer, tmp_path):
    dialogue = Dialogue(answerer)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(BadImageError):
        dialogue.show(str(tmp_path / "bad.png"))
    with pytest.raises(NotFoundError):
        dialogue.show(str(tmp_path / "none.png"))
    with pytest.raises(ConversationError, match="empty"):
        dialogue.ask("  ", max_new_tokens=2)
    assert (dialogue.turns, dialogue.images) == ([], [])
