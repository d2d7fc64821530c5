"""What LLaVA's evaluation says after a question; answers come in this form because the model was trained on it."""

SHORT_ANSWER = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."


def with_suffix(text: str, *suffixes: str) -> str:
    """Each on a line of its own."""
    return "\n".join([text.strip(), *suffixes])
