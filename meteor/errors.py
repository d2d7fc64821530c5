"""Errors that a user of the project can meet, in one tree.

MeteorError
├── SettingsError            a setting is unknown, of the wrong type, or contradicts another
├── MissingPackageError      an optional package is needed and not installed
├── StorageError             a file or object cannot be read or written
│   ├── NotFoundError
│   ├── InaccessibleError    this file cannot be read (its rights, a circle of links, its size), and others can
│   ├── DamagedError         a file's content is not what was written
│   ├── UnsafeNameError      a name that comes from data leads out of its folder, or names no file
│   └── AlreadyExistsError   a conditional put lost the race
├── DataError                a sample cannot be used
│   ├── ConversationError    its turns or placeholders are wrong
│   ├── TokenisationError    template and tokenizer disagree
│   ├── TooLongError         a prompt and its answer need more positions than the language model has
│   └── ImagePathError       its image path leaves the configured roots
├── BadImageError            an image goes to the quarantine table; carries a reason code
├── QuarantineLimitError     too many bad images
├── CacheError               the feature cache is damaged or incomplete
│   ├── CacheMismatchError   the cache was made with other settings than the model wants
│   └── CorruptPayloadError  a checksum does not match
├── CheckpointError          a checkpoint is incomplete, damaged, or does not fit
├── TrainingError            training cannot continue
│   └── FailedStepError      a step's loss or gradient is not finite; carries the samples of its batch
├── SupersededError          another start of the stage has taken over its folder
├── TrackingError            the tracking server cannot be reached, or refused
└── ClusterError             a cluster does not answer, or is in a wrong state
"""

from typing import Any


class MeteorError(Exception):
    """Base of all errors of this project; the message says what is wrong, the value, and what to do."""


class SettingsError(MeteorError):
    pass


class MissingPackageError(MeteorError):
    pass


class StorageError(MeteorError):
    pass


class NotFoundError(StorageError):
    pass


class InaccessibleError(StorageError):
    pass


class DamagedError(StorageError):
    pass


class UnsafeNameError(StorageError):
    pass


class AlreadyExistsError(StorageError):
    pass


class DataError(MeteorError):
    pass


class ConversationError(DataError):
    pass


class TokenisationError(DataError):
    pass


class TooLongError(DataError):
    pass


class ImagePathError(DataError):
    pass


class BadImageError(MeteorError):
    """Error for an image that cannot be used.

    Attributes:
        reason: short stable code for the quarantine table, for example ``"truncated"``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    # Ray sends errors between processes by pickling; the default would call the class with the message alone.
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
    """Error for a training step that was stopped before the weights changed.

    Attributes:
        failure: details of the step as JSON values: ``step``, ``epoch``, ``problem``, ``lr``, ``loss``, ``grad_norm`` and
            ``samples``. The loss and the norm are None if they were not computed, and text if they are not finite. The
            samples are those of the global batch, each with its ``id``, its ``row`` in the sample table, its ``worker``,
            ``micro_batch`` and ``micro_batch_loss``.
    """

    def __init__(self, message: str, failure: dict[str, Any]) -> None:
        super().__init__(message)
        self.failure = failure

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, Any]]]:
        return type(self), (str(self), self.failure)


class SupersededError(MeteorError):
    pass


class TrackingError(MeteorError):
    pass


class ClusterError(MeteorError):
    """Error for a cluster that does not answer, or is in a wrong state."""
