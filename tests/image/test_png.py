"""PNG files with long, odd or damaged metadata are images like any other."""

import io
import struct
import zlib

import pytest
from PIL import Image

from meteor.image.decode import decode_image

MAX_PIXELS = 1_000_000
ORIENTATION_TAG = 0x0112


def encode(image, **options):
    sink = io.BytesIO()
    image.save(sink, "PNG", **options)
    return sink.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PLAIN = encode(Image.new("RGB", (60, 40), (200, 30, 30)))
LONG = zlib.compress(b"x" * (1 << 21))
WRONG = chunk(b"tEXt", b"a\0b")[:-1] + b"\0"


@pytest.mark.parametrize(
    "data",
    [
        PLAIN[:33] + chunk(b"zTXt", b"note\0\0" + LONG) + PLAIN[33:],
        PLAIN[:33] + chunk(b"iTXt", b"note\0\1\0\0\0" + LONG) + PLAIN[33:],
        PLAIN[:33] + chunk(b"iCCP", b"p\0\0" + LONG) + PLAIN[33:],
        PLAIN[:33] + chunk(b"iCCP", b"no profile") + PLAIN[33:],
        PLAIN[:33] + chunk(b"tEXt", b"t\0" + b"x" * (3 << 20)) + PLAIN[33:],
        PLAIN[:33] + WRONG + PLAIN[33:],
        PLAIN[:33] + chunk(b"eXIf", b"no exif")[:-1] + b"\0" + PLAIN[33:],
        PLAIN[:-12] + chunk(b"zTXt", b"note\0\0" + LONG) + PLAIN[-12:],
        PLAIN + b"after the end",
    ],
)
def test_long_or_damaged_metadata_of_a_png_are_no_damage_of_its_pixels(data):
    assert decode_image(data, max_pixels=MAX_PIXELS).getpixel((0, 0)) == (200, 30, 30)


@pytest.mark.parametrize("where", ["exif", "xmp"])
def test_a_png_is_turned_as_its_metadata_say(where):
    image = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
    if where == "exif":
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = 6
        data = encode(image, exif=exif)
    else:
        xmp = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
            <rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""
        plain = encode(image)
        data = plain[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp) + plain[33:]
    assert decode_image(data, max_pixels=MAX_PIXELS).size == (image.height, image.width)
