"""Images of question sets that are no files yet: inside the benchmark's own files, or to be resized first.

They are written once, below the caches' root, and from there on are images as any others: indexed, encoded, cached.
"""

import io
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from PIL import Image

from meteor import storage
from meteor.data.roots import resolve_image
from meteor.errors import BadImageError, NotFoundError
from meteor.evaluation.question_set import QuestionSet
from meteor.image.decode import decode_image

_NUM_THREADS = 8
_DONE = "written.json"


def is_written(questions: QuestionSet) -> bool:
    """Whether the set's images are there, made from the files that it was read from."""
    if not questions.has_own_images or questions.image_root is None:
        return True
    try:
        return storage.read_json(storage.join(questions.image_root, _DONE)) == questions.sources
    except NotFoundError:
        return False


def write_images(
    questions: QuestionSet, roots: Mapping[str, str], *, max_pixels: int, on_written: Callable[[int], None]
) -> None:
    """Write them; what says that all are there comes last, so that an interrupted call is begun again.

    An image that is missing is left out, and one that cannot be decoded is written as it is: the index says why later.

    Args:
        questions: its `has_own_images` is true.
        roots: of images that are resized, without the set's own.
        max_pixels: larger ones are not decoded.
        on_written: called with how many are written so far.
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
            pending.append(pool.submit(_write, storage.join(root, name), data, questions.long_side, max_pixels))
            # A few at a time: a benchmark's images together do not fit into memory.
            settle(2 * _NUM_THREADS)
        settle(0)
    storage.write_json(storage.join(root, _DONE), questions.sources)


def _contents(questions: QuestionSet, roots: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes of the file as it is): inside the benchmark's files, in its folder, or under the run's roots."""
    if questions.embedded is not None:
        new_names = {old: new for new, old in questions.resized.items()}
        for name, data in questions.embedded():
            yield new_names.get(name, name), data
        return
    roots = roots if questions.folder.is_file else {"": questions.uri}
    for name, old in questions.resized.items():
        try:
            yield name, storage.read_bytes(resolve_image(old, roots))
        except NotFoundError:
            continue


def _write(uri: str, data: bytes, long_side: int | None, max_pixels: int) -> None:
    storage.write_bytes(uri, resize(data, long_side, max_pixels) if long_side else data)


def resize(data: bytes, long_side: int, max_pixels: int) -> bytes:
    """An image file as PNG, its longer side ``long_side`` pixels; as it is where it cannot be decoded."""
    try:
        image = decode_image(data, max_pixels=max_pixels)
    except BadImageError:
        return data
    scale = long_side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    sink = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(sink, "PNG", compress_level=1)
    return sink.getvalue()
