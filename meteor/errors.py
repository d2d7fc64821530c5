"""Every error of the project that a user can meet, in one tree.

MeteorError
├── SettingsError            a setting is unknown, of the wrong type, or contradicts another
├── MissingPackageError      an optional package is needed and not installed
├── StorageError             a file or object cannot be read or written
│   ├── NotFoundError
│   └── AlreadyExistsError   a conditional put lost the race
├── DataError                a sample cannot be used
│   ├── ConversationError    its turns or placeholders are wrong
│   ├── TokenisationError    template and tokenizer disagree
│   └── ImagePathError       its image path leaves the configured roots
├── BadImageError            an image goes to the quarantine table; carries a reason code
├── QuarantineLimitError     too many bad images
├── CacheError               the feature cache is damaged or incomplete
│   ├── CacheMismatchError   the cache was made with other settings than the model wants
│   └── CorruptPayloadError  a checksum does not match
├── CheckpointError          a checkpoint is incomplete, damaged, or does not fit
├── TrainingError            training cannot go on
│   └── FailedStepError      a step's loss or gradient is not finite; carries the samples of its batch
└── TrackingError            the tracking server refused
"""

from typing import Any


class MeteorError(Exception):
    """Base of all errors of this project. The message says what is wrong, the value, and what to do."""


class SettingsError(MeteorError):
    pass


class MissingPackageError(MeteorError):
    pass


class StorageError(MeteorError):
    pass


class NotFoundError(StorageError):
    pass


class AlreadyExistsError(StorageError):
    pass


class DataError(MeteorError):
    pass


class ConversationError(DataError):
    pass


class TokenisationError(DataError):
    pass


class ImagePathError(DataError):
    pass


class BadImageError(MeteorError):
    """An image that cannot be used.

    Attributes:
        reason: a short stable code for the quarantine table, for example ``"truncated"``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, str(self))


class QuarantineLimitError(MeteorError):
    pass


class CacheError(MeteorError):
    pass


class CacheMismatchError(CacheError):
    pass


class CorruptPayloadError(CacheError):
    pass


class CheckpointError(MeteorError):
    pass


class TrainingError(MeteorError):
    pass


class FailedStepError(TrainingError):
    """A step that was stopped before the weights changed.

    Attributes:
        failure: as JSON: ``step``, ``epoch``, ``problem``, ``lr``, ``loss`` and ``grad_norm`` (None where it did not come to
            them, a text where they are not finite), and ``samples``: of the global batch, each with its ``id``, its ``row``
            in the sample table, its ``worker``, ``micro_batch`` and ``micro_batch_loss``.
    """

    def __init__(self, message: str, failure: dict[str, Any]) -> None:
        super().__init__(message)
        self.failure = failure

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, Any]]]:
        return type(self), (str(self), self.failure)


class TrackingError(MeteorError):
    pass


class ClusterError(MeteorError):
    """A cluster does not answer, or is not as it must be."""
