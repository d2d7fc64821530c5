"""Pillow's settings of the process, changed while images are decoded: its warnings and its limit of pixels."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image


class _PillowSettings:
    """Warning filters that silence Pillow on odd files, and Pillow's own limit of pixels set to the caller's.

    Both belong to the process. The first thread to enter sets them, and the last to leave restores them. If each thread did
    both, a thread could restore settings that another had set, and silence Pillow for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limits: list[int] = []
        self._saved_filters = warnings.catch_warnings()
        self._saved_limit: int | None = None

    @contextmanager
    def tamed(self, max_pixels: int) -> Iterator[None]:
        """Silence Pillow, and let it refuse what has more than twice ``max_pixels`` pixels before it allocates.

        That limit catches tiles and frames that are larger than their image; the caller checks the image itself. When
        several threads are inside, the largest of their limits holds.
        """
        with self._lock:
            if not self._limits:
                self._saved_limit = Image.MAX_IMAGE_PIXELS
                self._saved_filters = warnings.catch_warnings()
                self._saved_filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
                warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
            self._limits.append(max_pixels)
            Image.MAX_IMAGE_PIXELS = max(self._limits)
        try:
            yield
        finally:
            with self._lock:
                self._limits.remove(max_pixels)
                Image.MAX_IMAGE_PIXELS = max(self._limits, default=self._saved_limit)
                if not self._limits:
                    self._saved_filters.__exit__(None, None, None)


pillow_settings = _PillowSettings()
