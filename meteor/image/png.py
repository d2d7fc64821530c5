"""Chunks of PNG files: those that say nothing about pixels are left out before a decoder stumbles over them."""

import zlib

PNG = b"\x89PNG\r\n\x1a\n"
# Length, kind and checksum of a chunk.
_CHUNK_OVERHEAD = 12
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# Keywords of texts in which programs keep the orientation.
_TURNING_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0")


def without_metadata(data: bytes) -> bytes:
    """Return a PNG file without texts, colour profile, and optional parts whose checksum is wrong.

    Pillow refuses an image whose metadata are damaged or longer than a megabyte, although its pixels are whole.
    Metadata that tell how to turn the image stay. A file that ends early stays as it is from there on.
    """
    # Views, because the parts together are as long as the file.
    view, position = memoryview(data), len(PNG)
    parts = [view[:position]]
    while position + _CHUNK_OVERHEAD <= len(data):
        size = int.from_bytes(data[position : position + 4])
        kind, end = data[position + 4 : position + 8], position + _CHUNK_OVERHEAD + size
        if end > len(data):
            break
        content = view[position + 4 : end - 4]
        # Bit 5 of the first letter marks a part that a decoder may leave out.
        is_optional = bool(kind[0] & 0x20)
        is_unused = kind == b"iCCP" or (kind in _TEXTS and not data.startswith(_TURNING_TEXTS, position + 8, end))
        if not is_optional or not (is_unused or zlib.crc32(content) != int.from_bytes(data[end - 4 : end])):
            parts.append(view[position:end])
        position = end
        if kind == b"IEND":
            break
    return b"".join([*parts, view[position:]])
