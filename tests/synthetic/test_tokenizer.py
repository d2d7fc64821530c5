"""The tokenizer loads and behaves as Vicuna's does."""

from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from meteor.synthetic.tokenizer import make_tokenizer, tokenizer_text
from meteor.synthetic.vocabulary import COLOURS, SHAPES, WORDS
from meteor.text.template import VICUNA_SYSTEM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def test_it_ships_as_sentencepiece_alone_and_loads_as_a_fast_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    assert tokenizer.is_fast
    assert len(tokenizer) == 640
    special = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (0, 1, 2, 0)


def test_comma_and_newline_byte_are_pieces_and_the_newline_has_vicunas_id(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_tokens_to_ids(["<0x0A>", "<0x00>"]) == [13, 3]
    assert tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(",")) == ","
    assert tokenizer.convert_tokens_to_ids(",") not in tokenizer(",").input_ids[:2]


@pytest.mark.parametrize("text", ["with 12 circles, 345 stars\nand more", "grüne Bäume 日本", "two  spaces "])
def test_ids_equal_sentencepieces_and_decode_to_the_text(
    folder: Path, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    slow = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = tokenizer(text).input_ids
    assert ids == [1, *slow.encode(text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_offsets_point_into_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "USER: What colour is the star? ASSISTANT: blue"
    encoded = tokenizer(text, return_offsets_mapping=True)
    start, end = encoded.offset_mapping[-1]
    assert text[start:end].strip() == "blue"
    assert end == len(text)


def test_digits_stand_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("2024") == ["▁", "2", "0", "2", "4"]


@pytest.mark.parametrize("word", [*COLOURS, *SHAPES, *WORDS])
def test_every_one_word_answer_is_one_piece(tokenizer: PreTrainedTokenizerBase, word: str) -> None:
    assert tokenizer.tokenize(word) == [f"▁{word}"]


def test_vicunas_system_line_is_short(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer.tokenize(VICUNA_SYSTEM)) < 40


def test_training_is_deterministic_and_follows_the_seed(folder: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert tokenizer_text(0) != tokenizer_text(1)
