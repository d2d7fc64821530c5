"""One bad image stops no job: whatever goes wrong with it becomes a `BadImageError` with a reason."""

from collections.abc import Iterator
from contextlib import contextmanager

from meteor.errors import BadImageError, InaccessibleError, NotFoundError, StorageError


@contextmanager
def image_problems(uri: str) -> Iterator[None]:
    """Turn every error about one image into `BadImageError`; an outage of the store concerns all images and passes.

    The reason is "missing", "inaccessible" (its rights, a circle of links, its size), a reason of
    `meteor.image.decode.decode_image`, or "failed" for anything unforeseen, such as a lack of memory.

    Args:
        uri: URI of the image, for messages.
    """
    try:
        yield
    except NotFoundError as error:
        raise BadImageError("missing", f"{uri} does not exist") from error
    except InaccessibleError as error:
        raise BadImageError("inaccessible", str(error)) from error
    except (BadImageError, StorageError):
        raise
    except Exception as error:
        raise BadImageError("failed", f"{uri}: {type(error).__name__}: {error}") from error
