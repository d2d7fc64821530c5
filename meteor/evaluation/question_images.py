"""Images of question sets that must be written as files first, because they are inside tables or must be resized.

They are written once below the caches' root. After that they are indexed, encoded and cached like all other images.
"""

import io
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from PIL import Image

from meteor import storage
from meteor.data.roots import resolve_image
from meteor.errors import BadImageError, InaccessibleError, NotFoundError, UnsafeNameError
from meteor.evaluation.question_set import QuestionSet
from meteor.image.decode import decoded
from meteor.image.files import read_image_file

_NUM_THREADS = 8
_DONE = "written.json"


def is_written(questions: QuestionSet) -> bool:
    """Return whether the set's images have been written from the current version of its files."""
    if not questions.has_own_images or questions.image_root is None:
        return True
    try:
        return storage.read_json(storage.join(questions.image_root, _DONE)) == questions.sources
    except NotFoundError:
        return False


def write_images(
    questions: QuestionSet, roots: Mapping[str, str], *, max_pixels: int, on_written: Callable[[int], None]
) -> None:
    """Write the images, and last the record that all of them exist, so that an interrupted call starts again.

    An image that is missing, cannot be read, or whose name leads out of the root is left out. An image that cannot be decoded
    is written unchanged. The dataset index reports them.

    Args:
        questions: question set whose `has_own_images` is true.
        roots: roots of the images to resize, without the set's own root.
        max_pixels: number of pixels above which an image is not decoded.
        on_written: called with the number of images written so far.
    """
    assert questions.image_root is not None
    root, num_written, pending = questions.image_root, 0, deque[Future[None]]()

    def settle(most: int) -> None:
        nonlocal num_written
        while len(pending) > most:
            pending.popleft().result()
            num_written += 1
            on_written(num_written)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for name, data in _contents(questions, roots):
            try:
                uri = storage.join_below(root, name)
            except UnsafeNameError:
                continue
            pending.append(pool.submit(_write, uri, data, questions.long_side, max_pixels))
            # Only a few images wait at a time, because a benchmark's images together do not fit into memory.
            settle(2 * _NUM_THREADS)
        settle(0)
    storage.write_json(storage.join(root, _DONE), questions.sources)


def _contents(questions: QuestionSet, roots: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes of the unchanged file) from the benchmark's files, its folder, or the run's roots."""
    if questions.embedded is not None:
        new_names = {old: new for new, old in questions.resized.items()}
        for name, data in questions.embedded():
            yield new_names.get(name, name), data
        return
    roots = roots if questions.folder.is_file else {"": questions.uri}
    for name, old in questions.resized.items():
        try:
            yield name, read_image_file(resolve_image(old, roots))
        except (NotFoundError, InaccessibleError):
            continue


def _write(uri: str, data: bytes, long_side: int | None, max_pixels: int) -> None:
    storage.write_bytes(uri, resize(data, long_side, max_pixels) if long_side else data)


def resize(data: bytes, long_side: int, max_pixels: int) -> bytes:
    """Resize an image file to a PNG with a longer side of ``long_side`` pixels; a file that is no image stays as it is.

    The shorter side is rounded down, as by `resize_image_keep_ratio` of LLaVA-UHD's ``llava/slice_process.py``.
    """
    try:
        with decoded(data, max_pixels=max_pixels) as image:
            short_side = max(1, int((long_side / max(image.size)) * min(image.size)))
            size = (long_side, short_side) if image.width > image.height else (short_side, long_side)
            resized = image.resize(size, Image.Resampling.BICUBIC)
    except BadImageError:
        return data
    sink = io.BytesIO()
    # PNG is lossless, so resizing is the only change; the lowest compression level saves time.
    resized.save(sink, "PNG", compress_level=1)
    return sink.getvalue()
