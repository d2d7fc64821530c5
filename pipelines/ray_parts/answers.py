"""Store of a model's answers, so that a prompt is answered once, even after a crash and in other runs.

The store is a folder of immutable Parquet files with prompts and answers, whose names end in their crc32. A prompt is
the digest of everything that its answer depends on besides the model. Two runs that answer at the same time write different
files with equal answers.
"""

import logging
import time
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from meteor import storage
from meteor.config import settings_digest
from meteor.evaluation.questions import Question
from meteor.projector.answering import AS_TRAINED, AnswerSelection

_SCHEMA = pa.schema([("prompt", pa.string()), ("prediction", pa.string()), ("global_only", pa.bool_())])
_WRITE_EVERY_S = 30.0
_SUFFIX = ".parquet"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: text that the model wrote.
        global_only: whether the prompt was too long, so that the model saw its images by their global views alone.
    """

    text: str
    global_only: bool = False


def prompt_digest(question: Question, max_new_tokens: int, selection: AnswerSelection = AS_TRAINED) -> str:
    """Return the digest of the turns before the answer, the images' content, the answer's limit, and the token selection."""
    turns = question.sample.turns
    before = turns if turns[-1].role == "human" else turns[:-1]
    content = [[turn.role, turn.text, turn.num_images] for turn in before]
    # Answers with the selection of training keep the digests that they had before it could be changed.
    changes = [vars(selection)] if selection != AS_TRAINED else []
    return settings_digest([content, question.sample.system, question.image_keys, max_new_tokens, *changes])


class AnswerStore:
    """Answers of one model.

    Args:
        uri: folder, local or S3, whose name is a digest of the model and of the way in which it answers.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._new: dict[str, Answer] = {}
        self._written_at = time.monotonic()

    def read(self) -> dict[str, Answer]:
        """Read prompt -> answer from all files; the prompts of a damaged file are answered again."""
        known: dict[str, Answer] = {}
        for info in storage.list_objects(self._uri):
            if not info.uri.endswith(_SUFFIX):
                continue
            data = storage.read_bytes(info.uri)
            if not info.uri.endswith(f"-{zlib.crc32(data):08x}{_SUFFIX}"):
                _LOG.warning(
                    "%s is damaged: its content does not match its name. Its questions are answered again", info.uri
                )
                continue
            table = pq.read_table(pa.BufferReader(data))
            for row in table.to_pylist():
                # Files of earlier versions have no third column.
                known[row["prompt"]] = Answer(row["prediction"], row.get("global_only", False))
        return known

    def add(self, answers: Mapping[str, Answer]) -> bool:
        """Keep new answers, and write them if the last write is long enough ago; return whether they were written."""
        self._new |= answers
        is_due = time.monotonic() - self._written_at >= _WRITE_EVERY_S
        if is_due:
            self.flush()
        return is_due

    def flush(self) -> None:
        """Write the answers that are not written yet."""
        self._written_at = time.monotonic()
        if not self._new:
            return
        rows = [
            {"prompt": prompt, "prediction": answer.text, "global_only": answer.global_only}
            for prompt, answer in self._new.items()
        ]
        table = pa.Table.from_pylist(rows, _SCHEMA)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        data = sink.getvalue().to_pybytes()
        storage.write_bytes(storage.join(self._uri, f"{uuid.uuid4().hex}-{zlib.crc32(data):08x}{_SUFFIX}"), data)
        self._new = {}
