"""Tokenizer of the tiny CLIP's text tower, with a token for each word that a caption can contain."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from meteor.synthetic.vocabulary import COLOURS, CORNERS, ENDS, SHAPES, SIDES, WORDS

MAX_CAPTION_TOKENS = 48
_GLUE = ("a", "an", "at", "on", "the", "and", "with", "text", ",")
_PAD, _UNK, _START, _END = "<pad>", "<unk>", "<start>", "<end>"


def make_caption_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that gives ``<start> words <end>``, padded with ``<pad>``.

    ``<end>`` has the highest id, as in CLIP's own vocabulary. The text tower takes its result at the end token, which its
    code finds by the highest id or by the end id, depending on the configuration.
    """
    corners = [word for place in CORNERS for word in place.split()]
    words = dict.fromkeys((_PAD, _UNK, _START, *_GLUE, *COLOURS, *SHAPES, *corners, *SIDES, *ENDS, *WORDS, _END))
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(token, vocabulary[token]) for token in (_START, _END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        unk_token=_UNK,
        bos_token=_START,
        eos_token=_END,
        model_max_length=MAX_CAPTION_TOKENS,
    )
