"""Two tiny tokenizers: SentencePiece with byte fallback as Vicuna ships it, and a byte-level one with ChatML."""

import json
import os
import random
import sys
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from meteor.text.tokenizer import add_image_token, load_tokenizer

sys.path.insert(0, str(Path(__file__).parent))

# Lower-case letters come from the words; capitals, digits and punctuation so that only what is exotic needs bytes.
WORDS = (
    "a the of is what on in and to are how many dogs cats red blue table image shows question answer user assistant "
    "human chat between curious artificial intelligence gives helpful detailed polite answers questions there USER: "
    "ASSISTANT: , . ? ! 1 2 3 4 5 6 7 8 9 0 x y z j k v w"
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_corpus(num_lines=400):
    rng, words = random.Random(0), WORDS.split()
    return [" ".join(rng.choice(words) for _ in range(12)) for _ in range(num_lines)]


def make_vicuna_folder(folder, *, legacy):
    """A folder as Vicuna's: ``tokenizer.model`` and a config, no ``tokenizer.json``. Vicuna 1.5 has legacy false."""
    os.makedirs(folder)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_corpus()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": legacy,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def make_byte_level_tokenizer(chat_template=CHATML, **kwargs):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(make_corpus(), trainer)
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | kwargs
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    tokenizer.chat_template = chat_template
    add_image_token(tokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def vicuna(tmp_path_factory):
    return load_tokenizer(make_vicuna_folder(tmp_path_factory.mktemp("text") / "vicuna", legacy=False))


@pytest.fixture(scope="session")
def legacy_vicuna(tmp_path_factory):
    return load_tokenizer(make_vicuna_folder(tmp_path_factory.mktemp("text") / "legacy", legacy=True))


@pytest.fixture(scope="session")
def byte_level():
    return make_byte_level_tokenizer()


@pytest.fixture(scope="session")
def make_byte_level():
    return make_byte_level_tokenizer


@pytest.fixture(scope="session")
def make_vicuna():
    return make_vicuna_folder
