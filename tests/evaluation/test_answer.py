import hashlib

import pytest
import torch

from meteor import storage
from meteor.cache import CacheIdentity, create_cache
from meteor.cache.folder import read_cache_info
from meteor.data.samples import Sample
from meteor.errors import CacheMismatchError, DataError, NotFoundError, SettingsError
from meteor.evaluation.answer import Answerer
from meteor.evaluation.questions import Question, last_answer
from meteor.image.pixels import PixelSettings
from meteor.projector.answering import AS_TRAINED, AnswerSelection
from meteor.text.conversation import Turn
from meteor.vision.live import LiveFeatures

PIXELS = PixelSettings(resolution=56)


@pytest.fixture(scope="module")
def answerer(finished_model):
    return Answerer(finished_model, device="cpu", dtype=torch.float32)


@pytest.fixture
def all_images(make_image, png, tmp_path):
    """Key -> (file, image) of a sliced, a square and a tall image."""
    found = {}
    for i, size in enumerate([(112, 56), (56, 56), (60, 150)]):
        one_image = make_image(*size, seed=i)
        data = png(one_image)
        (tmp_path / f"{i}.png").write_bytes(data)
        found[hashlib.sha256(data).hexdigest()] = (str(tmp_path / f"{i}.png"), one_image)
    return found


def make_question(name, words, keys=(), answer="a cat"):
    turns = (Turn("human", words, len(keys)), Turn("gpt", answer))
    return Question(name, Sample(name, tuple(keys), turns), (answer,), image_keys=tuple(keys))


def test_answers_of_a_batch_are_those_of_each_question_with_its_image_alone(answerer, all_images, ask):
    wide, square, tall = all_images
    asked = [
        ("what is it?", [wide]),
        ("why?", []),
        ("which of the two is red, and which one is not?", [square, tall]),
    ]
    questions = [make_question(str(i), words, keys) for i, (words, keys) in enumerate(asked)]
    live = LiveFeatures(answerer.model.frozen_encoder(), {key: file for key, (file, _) in all_images.items()}, PIXELS)
    answers = answerer.answer(questions, live, max_new_tokens=6)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2}
    expected = []
    for words, keys in asked:
        inputs = ask(answerer.processor, words, [all_images[key][1] for key in keys])
        tokens = answerer.model.generate(**inputs, **options)
        expected += answerer.decode(tokens[:, inputs["input_ids"].shape[1] :])
    assert answers == expected
    assert len(set(answers)) == 3
    # What the sample gives as the answer must not reach the prompt.
    other = make_question("0", *asked[0], answer="a dog")
    assert answerer.answer([other], live, max_new_tokens=6) == answers[:1]


def test_every_token_of_a_batch_is_that_of_the_question_alone(answerer, all_images):
    """Mixed numbers of images and sub-images, texts of many lengths, answers of 24 tokens that all go on to the end."""
    wide, square, tall = all_images
    shown = [[wide], [], [square, tall], [tall], [wide, wide, square], [square], [tall, wide]]
    words = ["what?", "why is it so?", "is it red or blue, and where?", "how many?", "which?", "a b c d e f g h", "x"]
    questions = [make_question(str(i), text, keys) for i, (text, keys) in enumerate(zip(words, shown, strict=True))]
    live = LiveFeatures(answerer.model.frozen_encoder(), {key: file for key, (file, _) in all_images.items()}, PIXELS)
    length = {"max_new_tokens": 24, "min_new_tokens": 24}
    batch = answerer.batch(questions, live)
    assert (batch.attention_mask == 0).any()
    together = answerer.generate(batch, **length)
    for row, question in zip(together, questions, strict=True):
        [alone] = answerer.generate(answerer.batch([question], live), **length)
        assert row.tolist() == alone.tolist(), question.id
    assert together.shape == (7, 24)
    assert len({tuple(row.tolist()) for row in together}) == 7


def test_the_question_and_its_answer_are_the_last_of_the_dialogue():
    turns = (Turn("human", "what?", 1), Turn("gpt", "a cat"), Turn("human", "sure?"), Turn("gpt", "yes"))
    question = Question("1", Sample("1", ("a",), turns), (last_answer(turns),), image_keys=("k",))
    assert (question.text, question.answer) == ("sure?", "yes")
    assert last_answer(turns[:3]) == ""


def test_features_of_another_cache_are_refused_naming_the_field(answerer, tmp_path):
    own = CacheIdentity.from_dict(answerer.model.config.cache_identity)
    other = CacheIdentity.from_dict({**own.to_dict(), "encoder_digest": "f" * 64})

    class Cache:
        def __init__(self, identity):
            self.identity = read_cache_info(create_cache(str(tmp_path), identity, "float16")).identity

    answerer.check(Cache(own))
    with pytest.raises(CacheMismatchError, match=f"encoder_digest: {'f' * 64} != {'0' * 64}"):
        answerer.check(Cache(other))


def test_the_model_has_the_type_asked_for_and_does_not_train(finished_model):
    model = Answerer(finished_model, device="cpu", dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_a_directory_that_is_no_finished_model_is_named_by_its_setting(tmp_path):
    with pytest.raises(SettingsError, match=r"evaluate\.model="):
        Answerer(str(tmp_path), device="cpu", dtype=torch.float32)


def test_a_model_on_s3_is_fetched(answerer, finished_model, s3_root):
    for info in storage.list_objects(finished_model):
        storage.upload_file(info.uri, storage.join(s3_root, "model", info.uri.rpartition("/")[2]))
    fetched = Answerer(storage.join(s3_root, "model"), device="cpu", dtype=torch.float32)
    torch.testing.assert_close(fetched.model.state_dict(), answerer.model.state_dict(), rtol=0, atol=0)
    with pytest.raises(NotFoundError, match=f"no model at {s3_root}/elsewhere"):
        Answerer(storage.join(s3_root, "elsewhere"), device="cpu", dtype=torch.float32)


def test_a_prompt_beyond_the_model_s_positions_is_refused_with_its_numbers(answerer, all_images):
    live = LiveFeatures(answerer.model.frozen_encoder(), {key: file for key, (file, _) in all_images.items()}, PIXELS)
    question = make_question("0", "x" * 9, list(all_images)[:1])
    num_tokens = int((answerer.batch([question], live).attention_mask > 0).sum())
    fits = 256 - num_tokens
    assert len(answerer.answer([question], live, max_new_tokens=fits)) == 1
    with pytest.raises(
        DataError, match=rf"has {num_tokens} tokens, and an answer up to {fits + 1}: .* has 256 positions"
    ):
        answerer.answer([question], live, max_new_tokens=fits + 1)


def test_a_selection_changes_the_slots_and_the_answer_and_is_taken_back(answerer, all_images):
    wide = next(iter(all_images))
    live = LiveFeatures(answerer.model.frozen_encoder(), {key: file for key, (file, _) in all_images.items()}, PIXELS)
    question = make_question("0", "what is it?", [wide])
    trained = answerer.answer([question], live, max_new_tokens=8)
    slots = {
        selection: answerer.batch([question], live, selection=selection).num_slots.tolist()
        for selection in (AS_TRAINED, AnswerSelection(k=2), AnswerSelection(sub_images="global"))
    }
    assert [len(each) for each in slots.values()] == [3, 3, 1]
    assert [max(each) for each in slots.values()] == [4, 2, 4]
    for selection in slots:
        assert answerer.answer([question], live, max_new_tokens=8, selection=selection)
    assert answerer.answer([question], live, max_new_tokens=8) == trained


def test_a_model_that_padding_disturbs_answers_one_by_one(answerer, all_images, monkeypatch):
    live = LiveFeatures(answerer.model.frozen_encoder(), {key: file for key, (file, _) in all_images.items()}, PIXELS)
    questions = [make_question(str(i), words, []) for i, words in enumerate(("why?", "how many are there?", "x"))]
    expected, sizes, generate = answerer.answer(questions, live, max_new_tokens=4), [], answerer.generate
    monkeypatch.setattr(answerer, "_answers_together", False)
    monkeypatch.setattr(
        answerer, "generate", lambda batch, **limits: sizes.append(len(batch.input_ids)) or generate(batch, **limits)
    )
    assert answerer.answer(questions, live, max_new_tokens=4) == expected
    assert sizes == [1, 1, 1]
