"""Forms of a dialogue in a record: LLaVA's turns, chat messages with content parts, and pairs of texts.

All forms become LLaVA's turns with image placeholders, and the names of the images in the order of the placeholders.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

from meteor.constants import IMAGE_PLACEHOLDER
from meteor.formatting import shorten
from meteor.text.conversation import ConversationProblem

DIALOGUE_KEYS = ("conversations", "messages", "texts")
# The key of LLaVA's files, and those of LLaMA-Factory, ms-swift and others.
IMAGE_KEYS = ("image", "images", "image_path", "image_paths")
# Keys that look like images or other media; only those above are read.
_MEDIA = re.compile(r"image|img|picture|photo|video|audio|visual", re.IGNORECASE)
_IMAGE_PARTS = ("image", "image_url")
_LONGEST_SHOWN = 80


class Dialogue(NamedTuple):
    """A record's dialogue in LLaVA's form.

    Attributes:
        turns: list of ``{"from": ..., "value": ...}``, or another value if the record has none.
        images: names of the images in the order of the placeholders; images that no turn shows are at the end.
    """

    turns: Any
    images: tuple[str, ...]


def looks_like_media(key: str) -> bool:
    """Return whether a key looks like that of images or other media."""
    return _MEDIA.search(key) is not None


def image_name(value: Any) -> str | None:
    """Return the name that a value gives to an image: a text, or the path of the hub's ``{"bytes", "path"}``; else None."""
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"} and not value.get("bytes"):
        value = value.get("path")
    if not isinstance(value, str):
        return None
    return (unquote(value[len("file://") :]) if value.startswith("file://") else value) or None


def name_problem(name: str) -> str:
    """Return why a name cannot be that of a file; "" if it can."""
    # Nearly all names are those of files.
    if ":" not in name:
        return ""
    if name.startswith(("http://", "https://")):
        return f"{shorten(name, _LONGEST_SHOWN)!r} is a web address: download the image and name the file"
    if name[:5].lower() == "data:":
        return "a data: URI is read in the samples of training alone: write the image as a file and name it"
    return ""


def read_dialogue(
    record: dict[str, Any], images: Sequence[str], spare: Sequence[str] = ()
) -> Dialogue | ConversationProblem:
    """Read the dialogue of a record, whatever its form.

    Args:
        record: record of a file.
        images: names of the images that stand beside the dialogue.
        spare: names of images that come with the record, for a record that names none.
    """
    given = [key for key in DIALOGUE_KEYS if record.get(key)]
    if len(given) > 1:
        return ConversationProblem("two_dialogues", f"the record has {' and '.join(map(repr, given))}: keep one")
    if not given and "conversations" not in record:
        named = next((key for key in DIALOGUE_KEYS if key in record), "")
        found = (
            f"{named!r} must be a list, and is {_shown(record[named])}" if named else f"it has none of {DIALOGUE_KEYS}"
        )
        return ConversationProblem("empty_conversation", f"the record has no dialogue: {found}")
    turns = record[given[0] if given else "conversations"]
    if given == ["texts"]:
        return _from_pairs(turns, images or spare)
    if given and isinstance(turns, list) and isinstance(turns[0], dict) and turns[0].get("role") is not None:
        return _Messages(images, spare).read(turns)
    return Dialogue(turns, tuple(images or spare))


def _from_pairs(pairs: Any, images: Sequence[str]) -> Dialogue | ConversationProblem:
    """Read The Cauldron's pairs; if no text has a placeholder, the images come before the first question."""
    turns = []
    for position, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        if not isinstance(pair, dict) or not all(isinstance(pair.get(key), str) for key in ("user", "assistant")):
            return ConversationProblem(
                "bad_turn",
                f"pair {position} must be an object with texts 'user' and 'assistant', and is {_shown(pair)}",
            )
        turns += [{"from": "human", "value": pair["user"]}, {"from": "gpt", "value": pair["assistant"]}]
    _show_first(turns, len(images))
    return Dialogue(turns, tuple(images))


def _show_first(turns: list[dict[str, Any]], num_images: int) -> None:
    """Show images before the first question if no turn shows one, as TRL does with messages of text alone."""
    if any(IMAGE_PLACEHOLDER in turn["value"] for turn in turns):
        return
    first = next((turn for turn in turns if turn["from"] in ("human", "user")), None)
    if first is not None and num_images:
        first["value"] = f"{IMAGE_PLACEHOLDER}\n" * num_images + first["value"]


class _Messages:
    """Reader of chat messages: parts without an image of their own show those beside the messages, one after the other."""

    def __init__(self, images: Sequence[str], spare: Sequence[str]) -> None:
        self._beside = list(images or spare)
        self._must_be_shown = bool(images)
        self._next = 0
        self._used: set[int] = set()
        self._shown: list[str] = []
        self._has_parts = False

    def read(self, messages: list[Any]) -> Dialogue | ConversationProblem:
        turns = []
        for position, message in enumerate(messages):
            value = self._content(message)
            if value is None:
                return ConversationProblem(
                    "bad_turn",
                    f"message {position} must be an object with the text 'role', and with 'content', a text or a list of "
                    f"parts, and is {_shown(message)}",
                )
            if isinstance(value, ConversationProblem):
                return ConversationProblem(value.reason, f"message {position}: {value.message}")
            turns.append({"from": message["role"], "value": value})
        if not self._has_parts and not self._shown:
            _show_first(turns, len(self._beside))
            return Dialogue(turns, tuple(self._beside))
        left = [name for i, name in enumerate(self._beside) if i not in self._used]
        is_left_alone = not self._must_be_shown and self._shown and not self._used
        return Dialogue(turns, (*self._shown, *([] if is_left_alone else left)))

    def _content(self, message: Any) -> str | ConversationProblem | None:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return None
        content = message.get("content")
        if isinstance(content, str):
            for _ in range(content.count(IMAGE_PLACEHOLDER)):
                self._take_next()
            return content
        if not isinstance(content, list):
            return None
        self._has_parts = True
        words = ""
        for part in content:
            value = self._part(part)
            if isinstance(value, ConversationProblem):
                return value
            # As templates do, which put nothing between a text and the next.
            words += value
        return words

    def _part(self, part: Any) -> str | ConversationProblem:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            for _ in range(part["text"].count(IMAGE_PLACEHOLDER)):
                self._take_next()
            return part["text"]
        if kind not in _IMAGE_PARTS:
            return ConversationProblem("bad_part", f"a part must be a 'text' or an 'image', and is {_shown(part)}")
        own = [part[key] for key in ("image", "image_url", "url", "path") if part.get(key) is not None]
        if not own:
            if self._take_next(part.get("index")):
                return IMAGE_PLACEHOLDER
            return ConversationProblem("part_without_image", f"an image part has no image: {_shown(part)}")
        value = own[0].get("url") if isinstance(own[0], dict) and "url" in own[0] else own[0]
        name = image_name(value)
        if name is None:
            return ConversationProblem("bad_image_field", f"an image part must name a file, and is {_shown(part)}")
        self._shown.append(name)
        return IMAGE_PLACEHOLDER

    def _take_next(self, index: Any = None) -> bool:
        """Show the image at an index beside the messages, or the next one; return whether there is one."""
        position = index if isinstance(index, int) and not isinstance(index, bool) else self._next
        if not 0 <= position < len(self._beside):
            return False
        self._next = position + 1
        self._used.add(position)
        self._shown.append(self._beside[position])
        return True


def _shown(value: object) -> str:
    return shorten(repr(value), _LONGEST_SHOWN)
