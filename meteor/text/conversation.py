"""Conversations: their turns, and a parser of LLaVA's ``conversations`` lists."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal, NamedTuple

from meteor.constants import IMAGE_PLACEHOLDER
from meteor.errors import ConversationError
from meteor.formatting import shorten

Role = Literal["human", "gpt"]

_LONGEST_SHOWN = 80
_ROLES: tuple[Role, Role] = ("human", "gpt")
_SPEAKERS: Mapping[str, Role] = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


class Turn(NamedTuple):
    """Turn of a conversation.

    A tuple, because a mixture has millions of turns and a frozen dataclass takes four times as long to make.

    Attributes:
        role: speaker, ``"human"`` or ``"gpt"``.
        text: words of the turn, without image placeholders.
        num_images: number of images shown in this turn, all before the text.
    """

    role: Role
    text: str
    num_images: int = 0


@dataclass(frozen=True)
class Conversation:
    """Alternating turns that start with the human; ``system`` replaces the template's own system prompt."""

    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def num_images(self) -> int:
        return sum(turn.num_images for turn in self.turns)


@dataclass(frozen=True)
class ConversationProblem:
    """Reason why a ``conversations`` list cannot be used: a short stable code and a sentence."""

    reason: str
    message: str


def find_problem(
    record_conversations: object, *, num_images: int, for_generation: bool = False
) -> ConversationProblem | None:
    """Find the first problem of a record's ``conversations``; return None if there is none.

    Args:
        record_conversations: LLaVA's list of ``{"from": ..., "value": ...}``.
        num_images: number of images in the record.
        for_generation: whether the last turn may be the human's (a question without its answer).
    """
    if not isinstance(record_conversations, list) or not record_conversations:
        return ConversationProblem(
            "empty_conversation",
            f"'conversations' must be a list of turns, and is {_shown(record_conversations)}",
        )
    for position, turn in enumerate(record_conversations):
        problem = _turn_problem(turn, position)
        if problem is not None:
            return problem
    _, turns = _split_system(record_conversations)
    return _order_problem(turns, for_generation) or _placeholder_problem(record_conversations, num_images)


def parse_conversation(
    record_conversations: object, *, num_images: int, sample_id: str, for_generation: bool = False
) -> Conversation:
    """Parse LLaVA's ``conversations`` list.

    ``<image>`` is removed, and images move to the front of their turn. As in LLaVA, the text of a turn with an image is
    stripped; other text stays unchanged. Nothing is repaired: an image without a placeholder is an error.

    Args:
        record_conversations: LLaVA's list of ``{"from": ..., "value": ...}``. The speakers ``user`` and ``assistant`` mean
            ``human`` and ``gpt``; a first turn from ``system`` is the system prompt.
        num_images: number of images in the sample.
        sample_id: id of the sample, for the error.
        for_generation: whether the last turn may be the human's.

    Raises:
        ConversationError: the list cannot be used; the message names the sample and the problem.
    """
    found = read_conversation(record_conversations, num_images=num_images, for_generation=for_generation)
    if isinstance(found, ConversationProblem):
        raise ConversationError(f"Sample {sample_id!r}: {found.message}.")
    return found


def read_conversation(
    record_conversations: object, *, num_images: int, for_generation: bool = False
) -> Conversation | ConversationProblem:
    """`parse_conversation` that returns what is wrong instead of raising it."""
    usual = _usual_turns(record_conversations, num_images)
    if usual is not None:
        return Conversation(usual)
    problem = find_problem(record_conversations, num_images=num_images, for_generation=for_generation)
    if problem is not None:
        return problem
    assert isinstance(record_conversations, list)
    system, turns = _split_system(record_conversations)
    return Conversation(tuple(_read_turn(turn) for turn in turns), system)


def _usual_turns(turns: object, num_images: int) -> tuple[Turn, ...] | None:
    """Questions with their answers, read in one pass because nearly all records are so; None for anything else."""
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        return None
    read: list[Turn] = []
    for turn, role in zip(turns, cycle(_ROLES), strict=False):
        try:
            speaker, text = turn["from"], turn["value"]
        except (KeyError, TypeError):
            return None
        if not isinstance(speaker, str) or not isinstance(text, str) or _SPEAKERS.get(speaker) != role:
            return None
        num_here = 0
        if IMAGE_PLACEHOLDER in text:
            if role == "gpt":
                return None
            num_here = text.count(IMAGE_PLACEHOLDER)
            num_images -= num_here
            text = text.replace(IMAGE_PLACEHOLDER, "").strip()
        read.append(Turn(role, text, num_here))
    return None if num_images else tuple(read)


def parse_turns(
    record_conversations: object, *, num_images: int, sample_id: str, for_generation: bool = False
) -> tuple[Turn, ...]:
    """Return the turns of ``parse_conversation``, for callers with a system prompt of their own."""
    return parse_conversation(
        record_conversations, num_images=num_images, sample_id=sample_id, for_generation=for_generation
    ).turns


def _turn_problem(turn: object, position: int) -> ConversationProblem | None:
    if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
        return ConversationProblem(
            "bad_turn",
            f"turn {position} must be an object with texts 'from' and 'value', and is {_shown(turn)}",
        )
    speaker = turn["from"]
    if speaker == "system" and position == 0:
        return None
    if speaker not in _SPEAKERS:
        return ConversationProblem(
            "unknown_speaker",
            f"turn {position} is from {speaker!r}; use 'human' or 'gpt' ('system' in the first turn only)",
        )
    return None


def _order_problem(turns: Sequence[dict[str, Any]], for_generation: bool) -> ConversationProblem | None:
    if not turns:
        return ConversationProblem("empty_conversation", "the conversation has a system prompt and no turns")
    roles = [_SPEAKERS[turn["from"]] for turn in turns]
    for position, role in enumerate(roles):
        expected = "gpt" if position % 2 else "human"
        if role != expected:
            return ConversationProblem(
                "turn_order",
                f"turn {position} is from {role!r} where {expected!r} must speak (turns alternate, the human first)",
            )
    if roles[-1] == "human" and not for_generation:
        return ConversationProblem("no_answer", "the last turn is a question without an answer")
    return None


def _placeholder_problem(turns: Sequence[dict[str, Any]], num_images: int) -> ConversationProblem | None:
    num_placeholders = 0
    for position, turn in enumerate(turns):
        num_here = turn["value"].count(IMAGE_PLACEHOLDER)
        if num_here and _SPEAKERS.get(turn["from"]) != "human":
            return ConversationProblem(
                "misplaced_placeholder",
                f"turn {position} is from {turn['from']!r} and has {IMAGE_PLACEHOLDER}: only the human shows images",
            )
        num_placeholders += num_here
    if num_placeholders > num_images:
        return ConversationProblem(
            "placeholder_without_image",
            f"{IMAGE_PLACEHOLDER} without image: {num_placeholders} placeholders, {num_images} images",
        )
    if num_placeholders < num_images:
        return ConversationProblem(
            "image_without_placeholder",
            f"image without {IMAGE_PLACEHOLDER}: {num_images} images, {num_placeholders} placeholders",
        )
    return None


def _split_system(record_conversations: list[dict[str, Any]]) -> tuple[str | None, list[dict[str, Any]]]:
    if record_conversations[0]["from"] == "system":
        return record_conversations[0]["value"], record_conversations[1:]
    return None, record_conversations


def _read_turn(turn: dict[str, Any]) -> Turn:
    text = turn["value"]
    num_images = text.count(IMAGE_PLACEHOLDER)
    if num_images:
        text = text.replace(IMAGE_PLACEHOLDER, "").strip()
    return Turn(_SPEAKERS[turn["from"]], text, num_images)


def _shown(value: object) -> str:
    return shorten(repr(value), _LONGEST_SHOWN)
