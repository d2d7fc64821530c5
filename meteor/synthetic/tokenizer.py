"""Small SentencePiece tokenizer like Vicuna's, trained on the text of generated samples."""

import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

import sentencepiece

from meteor.synthetic.questions import PairDealer, ask, ask_without_image
from meteor.synthetic.scenes import SceneDealer
from meteor.synthetic.streams import random_stream
from meteor.text.template import VICUNA_SYSTEM

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
# 512 pieces are too few: they contain either the answers or the words of Vicuna's system prompt as whole pieces.
VOCABULARY_SIZE = 640
MAX_LENGTH = 2048
_NUM_SCENES = 400


def tokenizer_text(seed: int) -> list[str]:
    """Generate lines like those that the generator and Vicuna's template write."""
    rng = random_stream(seed, "tokenizer")
    scenes = list(islice(SceneDealer(rng), _NUM_SCENES))
    lines = [VICUNA_SYSTEM, "USER: Describe the picture. ASSISTANT:", "Give a short description. What is in it?"] * 400
    lines += [scene.caption for scene in scenes]
    questions = [question for scene in scenes for question in ask(scene, rng)]
    questions += [question for _, _, question in islice(PairDealer(scenes, rng), _NUM_SCENES)]
    questions += [ask_without_image(rng) for _ in range(_NUM_SCENES)]
    return lines + [f"USER: {question.text} ASSISTANT: {question.answer}" for question in questions]


def make_tokenizer(folder: Path, *, seed: int = 0, vocabulary_size: int = VOCABULARY_SIZE) -> None:
    """Write ``tokenizer.model`` and ``tokenizer_config.json``, the files that Vicuna ships, into ``folder``.

    ``AutoTokenizer`` loads them as a fast tokenizer with offsets. Properties follow Vicuna's tokenizer. There is a piece for
    "," and for each byte (the newline is ``"<0x0A>"``), and each digit is a piece. The ids of unk, bos and eos are 0, 1 and
    2, and unk is the padding token.

    Args:
        folder: existing folder.
        seed: seed of the training text.
        vocabulary_size: number of pieces.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tokenizer_text(seed)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary_size,
        # The following settings are those of Llama's tokenizer.
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=-1,
        unk_surface=" ⁇ ",
        # With several threads the order of counting, and thus the result, would vary.
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(_config(), indent=2) + "\n", encoding="utf-8")


def _config() -> dict[str, Any]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": MAX_LENGTH,
        "padding_side": "right",
    }
