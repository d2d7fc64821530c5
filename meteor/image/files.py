"""Image files as bytes: read whole, up to a size that no image within the limit of pixels has."""

from meteor import storage

# Room for 178,956,970 pixels, the default limit, of four channels of 16 bits without compression, and for metadata.
MAX_FILE_BYTES = 2 << 30


def read_image_file(uri: str) -> bytes:
    """Read the bytes of an image file.

    Raises:
        NotFoundError: the file does not exist.
        InaccessibleError: the file cannot be read, or has more than `MAX_FILE_BYTES`.
    """
    return storage.read_bytes(uri, max_bytes=MAX_FILE_BYTES)
