"""Texts that LLaVA's evaluation appends to a question; models trained on them answer in the form that they request."""

SHORT_ANSWER = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."


def with_suffix(text: str, *suffixes: str) -> str:
    """Append each suffix on a separate line."""
    return "\n".join([text.strip(), *suffixes])
