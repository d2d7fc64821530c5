"""Questions in the form that all benchmarks share, whatever the form of their files."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from meteor.data.samples import Sample, SampleProblem
from meteor.text.conversation import Turn


@dataclass(frozen=True)
class Question:
    """A prompt: the sample's turns up to its last answer, which the model should give.

    Attributes:
        id: the question's id, unique in its set.
        sample: turns and image names; scores are grouped by its ``type``.
        references: right answers, or those of ten annotators; empty if the benchmark's owner does not publish them.
        choices: texts of the options A, B, ...; empty for free answers.
        group: common id of prompts that are scored together, such as the rotations of a question; "" for a single prompt.
        image_keys: keys of the images in order; empty before the index is known.
        stated_id: the id in the file, for files of answers; "" if it is ``id``.
    """

    id: str
    sample: Sample
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    group: str = ""
    image_keys: tuple[str, ...] = ()
    stated_id: str = ""

    @property
    def text(self) -> str:
        """Text of the last human turn."""
        return next(turn.text for turn in reversed(self.sample.turns) if turn.role == "human")

    @property
    def answer(self) -> str:
        """The most frequent reference, the earliest among equally frequent ones; "" without references."""
        return Counter(self.references).most_common(1)[0][0] if self.references else ""

    @property
    def unit(self) -> str:
        """Id of the prompts that are scored together with this one."""
        return self.group or self.id


@dataclass(frozen=True)
class LoadedQuestions:
    """Result of a benchmark's loader.

    Attributes:
        questions: questions in the order of the file.
        embedded: function that yields (name, bytes of the file) of images inside the benchmark's own files; None if the
            images are files already.
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
    """Make a question of a single turn, with its images before its text."""
    sample = Sample(id, tuple(images), (Turn("human", text.strip(), len(images)),), type)
    return Question(id, sample, tuple(references), tuple(choices), group)


def last_answer(turns: Sequence[Turn]) -> str:
    """Return the reference answer: the text of the last turn, or "" if the sample ends with a question."""
    return turns[-1].text if turns[-1].role == "gpt" else ""
