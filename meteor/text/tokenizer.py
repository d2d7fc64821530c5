"""Tokenizers of language models, and their tokens for images."""

import os
from dataclasses import dataclass

from tokenizers import Tokenizer
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from meteor.constants import IMAGE_PLACEHOLDER
from meteor.errors import SettingsError
from meteor.home import expand_home
from meteor.model_files import require_whole
from meteor.optional import import_optional
from meteor.pretrained import local_model

# Newline tokens in the vocabularies of SentencePiece with byte fallback, byte-level BPE, and plain text.
_NEWLINE_TOKENS = ("<0x0A>", "Ċ", "\n")


@dataclass(frozen=True)
class VisualTokens:
    """Token ids of an image in a prompt.

    Attributes:
        image_id: id of ``<image>``, at every visual slot.
        slice_id: id after a slice within a row.
        row_id: id after the last slice of a row.
    """

    image_id: int
    slice_id: int
    row_id: int


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer without running code of the model's repository, and give it the special token ``<image>``.

    If the tokenizer has no padding token, its end token (or unknown token) becomes the padding token in memory. Batches
    need an id for padding, and the attention mask hides it.

    Args:
        path: local folder, s3:// folder or hub id.

    Raises:
        SettingsError: the folder does not exist, has no tokenizer, or its tokenizer is not fast.
        MissingPackageError: the folder has only a SentencePiece model, and a package for its conversion is missing.
    """
    folder = expand_home(local_model(path))
    if not os.path.isdir(folder) and _looks_local(path):
        raise SettingsError(f"The tokenizer's folder {folder!r} does not exist: check the path of the language model.")
    if os.path.isdir(folder):
        require_whole(folder, setting="llm.path")
        _check_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder if os.path.isdir(folder) else path, trust_remote_code=False)
    # The tokenizers library raises plain Exception for a tokenizer.json that it cannot read.
    except Exception as error:
        raise SettingsError(
            f"No tokenizer can be loaded from {path!r}: {error} Give a folder with tokenizer.json or tokenizer.model, "
            f"or a name on the hub."
        ) from error
    if not tokenizer.is_fast:
        raise SettingsError(
            f"{path!r} has no fast tokenizer ({type(tokenizer).__name__}), and answers are located by its offsets."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None and tokenizer.unk_token is None:
            raise SettingsError(
                f"The tokenizer of {path!r} has no padding, end or unknown token: set one in its config."
            )
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    add_image_token(tokenizer)
    return tokenizer


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Add ``<image>`` as a special token, which no text of a user can become; keep it if it is there."""
    tokenizer.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)], special_tokens=True)


def find_visual_tokens(tokenizer: PreTrainedTokenizerBase) -> VisualTokens:
    """Return the ids of ``<image>``, "," and the newline byte: 32000, 29892 and 13 in Vicuna's vocabulary.

    The ids are looked up in the vocabulary, because ``tokenizer(",")`` would give the id of ``▁,`` in Vicuna's.

    Raises:
        SettingsError: the vocabulary lacks a comma, a newline token or ``<image>``.
    """
    vocabulary: Tokenizer = tokenizer.backend_tokenizer
    slice_id, image_id = vocabulary.token_to_id(","), vocabulary.token_to_id(IMAGE_PLACEHOLDER)
    newline_ids = [vocabulary.token_to_id(token) for token in _NEWLINE_TOKENS]
    row_id = next((found for found in newline_ids if found is not None), None)
    if slice_id is None or row_id is None:
        missing = "','" if slice_id is None else f"a newline (tried {', '.join(map(repr, _NEWLINE_TOKENS))})"
        raise SettingsError(
            f"The tokenizer's vocabulary has no token for {missing}, which separates slices and rows of slices: use a "
            "language model whose tokenizer has one."
        )
    if image_id is None:
        raise SettingsError(
            f"The tokenizer has no token {IMAGE_PLACEHOLDER!r}: load it with meteor.text.tokenizer.load_tokenizer."
        )
    return VisualTokens(image_id, slice_id, row_id)


def _looks_local(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1


def _check_folder(folder: str) -> None:
    names = os.listdir(folder)
    if "tokenizer.model" in names and "tokenizer.json" not in names:
        # If these packages are missing, transformers' own error misleadingly asks for tiktoken.
        needed_for = f"Reading the SentencePiece model in {folder!r}"
        import_optional("sentencepiece", needed_for=needed_for, install="pip install sentencepiece")
        import_optional("google.protobuf", needed_for=needed_for, install="pip install protobuf")
