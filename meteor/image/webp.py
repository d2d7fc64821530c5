"""Size of an extended WebP file's canvas, read from its first bytes before a decoder allocates it."""

_HEADER_BYTES = 30


def webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of the canvas of an extended WebP file; None for any other file.

    The chunk VP8X holds both, less one, in 24 bits each (https://developers.google.com/speed/webp/docs/riff_container).
    """
    is_extended = data.startswith(b"RIFF") and data[8:16] == b"WEBPVP8X" and len(data) >= _HEADER_BYTES
    if not is_extended:
        return None
    return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
