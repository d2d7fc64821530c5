import sys

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.errors import MissingPackageError, SettingsError, TokenisationError
from meteor.text.conversation import Conversation, Turn
from meteor.text.template import render
from meteor.text.tokenizer import VisualTokens, find_visual_tokens, load_tokenizer
from meteor.text.tokens import tokenise

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
DIALOGUES = {
    "one turn": ("what is there?", "a red table"),
    "three turns": ("what?", "cats", "how many cats are there?", "2, and 3 dogs.", "red?", "no"),
    "an empty answer": ("say nothing", "", "and now?", "answer"),
    "words of the template": ("what does ASSISTANT: do? USER: x", "it answers after ASSISTANT: and USER: too"),
    "special tokens": ("is </s> or <s> or <|im_end|> one?", "yes, </s> and <image> and <|im_end|> are</s>"),
    "unicode": ("was ist das? 日本", "😀 ein Kätzchen\n猫 👩‍👩‍👧", "more?", "é"),
    "white space": ("  two  spaces ", "  an answer \n\n with\tspace  "),
}


def make_conversation(*texts, num_images=0, system=None):
    turns = [Turn("gpt" if n % 2 else "human", text, 0 if n else num_images) for n, text in enumerate(texts)]
    return Conversation(tuple(turns), system)


def labelled_runs(sample):
    """Runs of labels that follow each other."""
    runs, previous = [], IGNORE_INDEX
    for label in sample.labels:
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return runs


def llavas_way(prompt, tokenizer):
    """LLaVA's tokenizer_image_token: the text between images as the tokenizer alone would read it."""
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
    ids = [tokenizer.bos_token_id]
    for number, chunk in enumerate(chunks):
        assert chunk[0] == tokenizer.bos_token_id
        ids += ([IMAGE_PLACE] if number else []) + chunk[1:]
    return ids


@pytest.mark.parametrize("name", DIALOGUES)
@pytest.mark.parametrize("tokenizer_name", ["vicuna", "legacy_vicuna", "byte_level"])
@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_labels_decode_to_the_answers(name, tokenizer_name, num_images, request):
    tokenizer = request.getfixturevalue(tokenizer_name)
    conversation = make_conversation(*DIALOGUES[name], num_images=num_images, system="Be helpful: 日")
    for template in ("vicuna_v1", "chat") if tokenizer_name == "byte_level" else ("vicuna_v1",):
        sample = tokenise(conversation, tokenizer, template)
        answers = DIALOGUES[name][1::2]
        assert len(sample.input_ids) == len(sample.labels)
        assert sample.input_ids.count(IMAGE_PLACE) == num_images
        assert [run[-1] for run in labelled_runs(sample)] == [tokenizer.eos_token_id] * len(answers)
        decoded = [tokenizer.decode(run[:-1]) for run in labelled_runs(sample)]
        space = " " if tokenizer_name == "byte_level" and template == "vicuna_v1" else ""
        assert decoded == [space + answer if answer else "" for answer in answers]


@pytest.mark.parametrize("tokenizer_name", ["vicuna", "legacy_vicuna", "byte_level"])
def test_special_tokens_in_the_words_stay_text(tokenizer_name, request):
    tokenizer = request.getfixturevalue(tokenizer_name)
    sample = tokenise(make_conversation(*DIALOGUES["special tokens"]), tokenizer, "vicuna_v1")
    assert sample.input_ids.count(tokenizer.eos_token_id) == 1
    assert sample.input_ids[-1] == sample.labels[-1] == tokenizer.eos_token_id
    assert sample.input_ids.count(tokenizer.bos_token_id or 0) == (tokenizer.bos_token_id is not None)
    assert "</s> or <s> or <|im_end|> one?" in tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize("tokenizer_name", ["vicuna", "legacy_vicuna"])
def test_ids_and_labels_of_one_turn_are_llavas(tokenizer_name, request):
    tokenizer = request.getfixturevalue(tokenizer_name)
    sample = tokenise(make_conversation("what is there?", "a red table", num_images=1), tokenizer, "vicuna_v1")
    question = f"{SYSTEM} USER: <image>\nwhat is there? ASSISTANT:"
    assert sample.input_ids == llavas_way(f"{question} a red table</s>", tokenizer)
    num_ignored = len(llavas_way(question, tokenizer))
    assert sample.labels == [IGNORE_INDEX] * num_ignored + sample.input_ids[num_ignored:]


@pytest.mark.parametrize("tokenizer_name", ["vicuna", "legacy_vicuna"])
@pytest.mark.parametrize("name", ["three turns", "unicode", "white space"])
def test_ids_of_several_turns_are_llavas(tokenizer_name, name, request):
    """Vicuna 1.5 (legacy false) puts no "▁" after </s>, earlier ones do; both are met."""
    tokenizer = request.getfixturevalue(tokenizer_name)
    texts = DIALOGUES[name]
    sample = tokenise(make_conversation(*texts, num_images=1), tokenizer, "vicuna_v1")
    prompt = f"{SYSTEM} USER: <image>\n"
    for number, text in enumerate(texts):
        prompt += f" ASSISTANT: {text}</s>" if number % 2 else f"{'USER: ' if number else ''}{text}"
    assert sample.input_ids == llavas_way(prompt, tokenizer)


def test_ids_worked_by_hand(vicuna):
    sample = tokenise(make_conversation("is?", "the", num_images=1, system="a"), vicuna, "vicuna_v1")
    prompt = [
        *("<s>", "▁a", "▁", "U", "S", "E", "R", ":", "▁", "<image>"),
        *("▁", "<0x0A>", "i", "s", "?", "▁", "A", "S", "S", "I", "S", "T", "A", "N", "T", ":"),
    ]
    answer = ["▁the", "</s>"]
    names = [vicuna.convert_ids_to_tokens(token) if token >= 0 else "<image>" for token in sample.input_ids]
    assert names == prompt + answer
    assert sample.labels == [IGNORE_INDEX] * len(prompt) + vicuna.convert_tokens_to_ids(answer)


def test_the_space_before_an_answer_is_learnt_even_where_it_is_a_token_of_its_own(vicuna, byte_level):
    for tokenizer, space in ((vicuna, "▁"), (byte_level, "Ġ")):
        sample = tokenise(make_conversation("is?", "😀"), tokenizer, "vicuna_v1")
        prompt = tokenise(make_conversation("is?", "😀"), tokenizer, "vicuna_v1", for_generation=True)
        (run,) = labelled_runs(sample)
        assert tokenizer.convert_ids_to_tokens(run[0]) == space
        assert sample.input_ids == prompt.input_ids + run


def test_plain_learns_the_caption_and_the_end(vicuna):
    sample = tokenise(make_conversation("describe it", "a red table", num_images=1), vicuna, "plain")
    caption = vicuna("a red table", add_special_tokens=False).input_ids
    assert sample.input_ids == [vicuna.bos_token_id, IMAGE_PLACE, *caption, vicuna.eos_token_id]
    assert sample.labels == [IGNORE_INDEX, IGNORE_INDEX, *caption, vicuna.eos_token_id]


@pytest.mark.parametrize("tokenizer_name", ["vicuna", "legacy_vicuna", "byte_level"])
def test_chat_gives_the_ids_of_the_tokenizers_own_chat(tokenizer_name, request, make_byte_level):
    tokenizer = request.getfixturevalue(tokenizer_name)
    messages = [
        {"role": "user" if number % 2 == 0 else "assistant", "content": text}
        for number, text in enumerate(DIALOGUES["three turns"])
    ]
    template = (
        "{{ bos_token or '' }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else "
        "' ' + m.content + eos_token }}{% endfor %}"
    )
    expected = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=False)
    own = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        sample = tokenise(make_conversation(*DIALOGUES["three turns"]), tokenizer, "chat")
    finally:
        tokenizer.chat_template = own
    assert sample.input_ids == expected


def test_white_space_that_an_added_token_swallows_is_swallowed(make_byte_level):
    tokenizer = make_byte_level(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + ' <|end|>' }}{% endfor %}",
        eos_token=AddedToken("<|end|>", lstrip=True, special=True),
        additional_special_tokens=[AddedToken(f"<|{role}|>", rstrip=True) for role in ("user", "assistant")],
    )
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "cats"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    sample = tokenise(make_conversation("what?", "cats"), tokenizer, "chat")
    assert sample.input_ids == expected
    (run,) = labelled_runs(sample)
    assert (tokenizer.decode(run[:-1]), run[-1]) == ("cats", tokenizer.eos_token_id)
    assert not {"Ċ", "Ġ"} & set(tokenizer.convert_ids_to_tokens(sample.input_ids))


def test_the_callers_tokenizer_is_left_as_it_is(vicuna):
    before = vicuna("a </s> b").input_ids
    tokenise(make_conversation(*DIALOGUES["special tokens"]), vicuna, "vicuna_v1")
    assert vicuna.backend_tokenizer.encode_special_tokens is False
    assert vicuna("a </s> b").input_ids == before


def test_nothing_to_learn_is_an_error_that_names_the_sample(byte_level):
    with pytest.raises(TokenisationError, match="'s7' has no answer token"):
        tokenise(make_conversation("a question alone"), byte_level, "chat", sample_id="s7")
    with pytest.raises(TokenisationError, match=r"'s8'.*plain"):
        tokenise(make_conversation("a", "b"), byte_level, "plain", sample_id="s8")


def test_an_end_token_is_needed(make_byte_level):
    with pytest.raises(SettingsError, match="end token"):
        tokenise(make_conversation("a", "b"), make_byte_level(eos_token=None), "vicuna_v1")


def test_separators_are_the_comma_and_the_newline_byte(vicuna, byte_level):
    assert find_visual_tokens(vicuna) == VisualTokens(400, vicuna.convert_tokens_to_ids(","), 3 + 10)
    assert vicuna.convert_ids_to_tokens([find_visual_tokens(vicuna).slice_id, 13]) == [",", "<0x0A>"]
    assert vicuna(",", add_special_tokens=False).input_ids != [find_visual_tokens(vicuna).slice_id]
    ids = find_visual_tokens(byte_level)
    assert byte_level.decode([ids.image_id, ids.slice_id, ids.row_id]) == "<image>,\n"


def test_a_vocabulary_without_separators_asks_for_ids():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, ",": 1}, unk_token="<unk>"))
    with pytest.raises(SettingsError, match="newline"):
        find_visual_tokens(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))


def test_a_folder_as_vicuna_ships_it_loads_with_offsets_and_padding(vicuna, tmp_path):
    assert vicuna.is_fast
    assert vicuna.pad_token == "</s>"
    vicuna.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again("a red table, 日").input_ids == vicuna("a red table, 日").input_ids


def test_a_folder_that_is_not_there_or_empty_is_named(tmp_path):
    with pytest.raises(SettingsError, match="nowhere' does not exist"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(SettingsError, match=r"tokenizer\.json or tokenizer\.model"):
        load_tokenizer(str(tmp_path))


def test_a_missing_sentencepiece_is_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingPackageError, match="pip install sentencepiece"):
        load_tokenizer(str(tmp_path))


def test_text_before_an_image_is_a_chunk_of_its_own(vicuna):
    conversation = make_conversation("is?", "the", num_images=2, system="a")
    ids = tokenise(conversation, vicuna, "vicuna_v1").input_ids
    chunks = [segment.text for segment in render(conversation, "vicuna_v1") if hasattr(segment, "text")]
    assert chunks == ["a USER: ", "\n", "\nis? ASSISTANT: the"]
    expected = [vicuna.bos_token_id]
    for chunk in chunks:
        expected += [*vicuna(chunk, add_special_tokens=False).input_ids, IMAGE_PLACE]
    assert ids == [*expected[:-1], vicuna.eos_token_id]


@pytest.mark.parametrize("tokenizer_name", ["vicuna", "byte_level"])
def test_words_after_an_image_belong_to_its_turn_and_nothing_else_does(tokenizer_name, request):
    tokenizer = request.getfixturevalue(tokenizer_name)
    turns = (
        Turn("human", "what is it?", 2),
        Turn("gpt", "a cat"),
        Turn("human", "and without an image?"),
        Turn("gpt", "yes"),
        Turn("human", "", 1),
        Turn("gpt", "a dog"),
        Turn("human", "and here?", 1),
        Turn("gpt", "no"),
    )
    for number, last in ((8, False), (7, True)):
        sample = tokenise(Conversation(turns[:number], None), tokenizer, "vicuna_v1", for_generation=last)
        assert len(sample.turns) == len(sample.input_ids)
        images = [turn for token, turn in zip(sample.input_ids, sample.turns, strict=True) if token == IMAGE_PLACE]
        assert images == [1, 1, 2, 3]
        for turn, words in ((1, "what is it?"), (2, ""), (3, "and here?")):
            ids = [
                token
                for token, of_turn in zip(sample.input_ids, sample.turns, strict=True)
                if of_turn == turn and token != IMAGE_PLACE
            ]
            assert tokenizer.decode(ids).strip() == words


def test_captions_have_no_words_to_choose_by(vicuna):
    sample = tokenise(make_conversation("look", "a red table", num_images=1), vicuna, "plain")
    assert not any(turn for token, turn in zip(sample.input_ids, sample.turns, strict=True) if token != IMAGE_PLACE)
