"""The one form inside: whatever file a benchmark comes in, its questions look like this."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from meteor.data.samples import Sample, SampleProblem
from meteor.text.conversation import Turn


@dataclass(frozen=True)
class Question:
    """One prompt: the sample's turns up to its last answer, which is what the model should say.

    Attributes:
        id: unique in its set.
        sample: turns and image names; its ``type`` is what scores are grouped by.
        references: right answers; the ten annotators' where there are ten; empty where the owner keeps them.
        choices: texts of the options A, B, ...; empty for free answers.
        group: what prompts share that are scored together (the rotations of one question); its own id elsewhere.
        image_keys: of its images, in order; empty before the index is known.
    """

    id: str
    sample: Sample
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    group: str = ""
    image_keys: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return next(turn.text for turn in reversed(self.sample.turns) if turn.role == "human")

    @property
    def answer(self) -> str:
        """The most frequent reference, the earlier of equals; "" if there is none."""
        return Counter(self.references).most_common(1)[0][0] if self.references else ""

    @property
    def unit(self) -> str:
        return self.group or self.id


@dataclass(frozen=True)
class LoadedQuestions:
    """What a benchmark's loader returns.

    Attributes:
        questions: in the order of the file.
        embedded: gives (name, bytes of the file) of images that come inside the benchmark's own files; None where they
            are files already.
        problems: records that cannot be used.
    """

    questions: list[Question]
    embedded: Callable[[], Iterator[tuple[str, bytes]]] | None = None
    problems: tuple[SampleProblem, ...] = ()


def ask(
    id: str,
    text: str,
    images: Sequence[str],
    references: Sequence[str] = (),
    *,
    type: str = "",
    choices: Sequence[str] = (),
    group: str = "",
) -> Question:
    """A question in one turn, its images before its text."""
    sample = Sample(id, tuple(images), (Turn("human", text.strip(), len(images)),), type)
    return Question(id, sample, tuple(references), tuple(choices), group)


def last_answer(turns: Sequence[Turn]) -> str:
    """The reference answer: the last turn's, "" where the sample ends with a question."""
    return turns[-1].text if turns[-1].role == "gpt" else ""
