"""Protocol of a benchmark's questions, and texts that request a form of answer.

Models trained on LLaVA's mixture have seen these texts behind questions, and answer in the form that they request.
"""

from dataclasses import dataclass

SHORT_ANSWER = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Protocol:
    """Form in which an evaluation asks a benchmark's questions.

    Attributes:
        ocr: whether the prompt contains the benchmark's OCR tokens.
        long_side: longer side of the images in pixels after resizing; None for unchanged images.
        blank_line: whether a blank line stands before the request for a form of answer.
    """

    ocr: bool = False
    long_side: int | None = None
    blank_line: bool = False

    def prompt(self, text: str, *parts: str) -> str:
        """Append parts to a question's text, each on a separate line; the last part requests a form of answer."""
        lines = [text.strip(), *parts]
        return "\n".join([*lines[:-1], "", lines[-1]] if self.blank_line else lines)
