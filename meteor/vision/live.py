"""Features without a cache: the frozen encoder runs each time an image is requested."""

import hashlib
from collections.abc import Generator, Iterable, Mapping

from meteor.errors import BadImageError, DataError, NotFoundError
from meteor.features import ImageFeatures
from meteor.image.files import read_image_file
from meteor.image.pixels import PixelSettings, slice_bytes
from meteor.vision.encode_images import encode_sliced
from meteor.vision.encoder import FrozenEncoder


class LiveFeatures:
    """Feature source that encodes each requested image: the control in benchmarks, or a way without space for a cache.

    Args:
        encoder: the frozen tower.
        uris: image key -> URI of the image file.
        settings: slicing parameters and limits.
    """

    def __init__(self, encoder: FrozenEncoder, uris: Mapping[str, str], settings: PixelSettings) -> None:
        self.encoder, self.uris, self.settings = encoder, uris, settings

    def get(self, image_key: str) -> ImageFeatures:
        """Read, slice and encode an image.

        Raises:
            DataError: the image file is gone, or has changed since it was indexed.
        """
        uri = self.uris[image_key]
        try:
            data = read_image_file(uri)
            if hashlib.sha256(data).hexdigest() != image_key:
                raise DataError(f"{uri} has changed since it was indexed as {image_key}: run cache_features again")
            return encode_sliced([slice_bytes(data, image_key, self.settings)], self.encoder)[0]
        except (BadImageError, NotFoundError) as error:
            raise DataError(f"{uri} was readable when it was indexed, but is not now ({error})") from error

    def prefetch(
        self, keys: Iterable[str], *, num_threads: int = 1, max_bytes: int = 0
    ) -> Generator[ImageFeatures, None, None]:
        """Yield features one after the other; the limits of reading ahead have no effect with a single encoder."""
        yield from map(self.get, keys)
