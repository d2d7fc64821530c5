"""Decoding: every mode as a viewer shows it, every bad file with its reason code. Files are made here with Pillow."""

import io
import pickle
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from meteor.errors import BadImageError, SettingsError
from meteor.image import decode as decoding
from meteor.image import shown
from meteor.image.byte_budget import ByteBudget
from meteor.image.decode import decode_image, decoded, read_size

MAX_PIXELS = 1_000_000
ORIENTATION_TAG = 0x0112


def make_image(width: int = 48, height: int = 32) -> Image.Image:
    """Smooth (JPEG keeps it), and different under every rotation and reflection."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / (width - 1), 255 * y / (height - 1)
    return Image.fromarray(np.dstack([red, green, (red + 2 * green) / 3]).astype(np.uint8))


def make_noise(width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_file(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def make_png_of_size(width: int, height: int) -> bytes:
    """A valid PNG header and no pixels: enough to be refused before any decoding."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def decode(data: bytes) -> np.ndarray:
    image = decode_image(data, max_pixels=MAX_PIXELS)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason_of(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(BadImageError) as caught:
        decode_image(data, max_pixels=max_pixels)
    return caught.value.reason


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG2000"])
def test_every_lossless_format_gives_the_pixels_back(file_format: str) -> None:
    one_image = make_image().quantize(64).convert("RGB")
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    np.testing.assert_array_equal(decode(make_file(one_image, file_format, **options)), np.asarray(one_image))


# What a viewer does for each EXIF orientation, in NumPy's words.
UPRIGHT = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: np.swapaxes(stored, 0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(np.swapaxes(stored, 0, 1), 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied_once(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = make_file(make_image(), file_format, exif=exif, **options)
    stored = np.asarray(Image.open(io.BytesIO(make_file(make_image(), file_format, **options))).convert("RGB"))
    np.testing.assert_array_equal(decode(data), UPRIGHT[orientation](stored))


def test_the_decoded_image_carries_no_orientation_for_the_next_reader() -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    image = decode_image(make_file(make_image(), "JPEG", exif=exif), max_pixels=MAX_PIXELS)
    assert image.size == (32, 48)
    assert ORIENTATION_TAG not in image.getexif()


@pytest.mark.parametrize("exif", [b"garbage!", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\x12"])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_exif_block_does_not_spoil_the_image(file_format: str, exif: bytes) -> None:
    prefix = b"Exif\0\0" if file_format == "JPEG" else b""
    data, plain = make_file(make_image(), file_format, exif=prefix + exif), make_file(make_image(), file_format)
    assert exif in data
    np.testing.assert_array_equal(decode(data), decode(plain))


def test_an_odd_exif_tag_beside_the_orientation_does_not_hide_it() -> None:
    # An ImageWidth written as text: Pillow reads the block, and fails when it has to write it anew.
    entries = [(0x0100, 2, 4, 0x41414141), (ORIENTATION_TAG, 3, 1, 6)]
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + ifd
    data = make_file(make_image(), "JPEG", exif=exif)
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decode(data).shape == (48, 32, 3)


def test_a_cmyk_jpeg_keeps_its_colours() -> None:
    # Pillow writes CMYK as Photoshop does: Adobe marker, inverted values.
    data = make_file(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in data
    np.testing.assert_allclose(decode(data), np.broadcast_to([255, 0, 0], (16, 16, 3)), atol=4)


def test_a_cmyk_tiff_keeps_its_colours() -> None:
    data = make_file(Image.new("CMYK", (4, 4), (255, 0, 0, 51)), "TIFF")
    np.testing.assert_allclose(decode(data), np.broadcast_to([0, 204, 204], (4, 4, 3)), atol=1)


def test_a_palette_is_resolved() -> None:
    one_image = make_image().quantize(20)
    np.testing.assert_array_equal(decode(make_file(one_image, "PNG")), np.asarray(one_image.convert("RGB")))


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_the_transparent_colour_of_a_palette_is_shown_white(file_format: str) -> None:
    one_image = Image.new("P", (2, 1))
    one_image.putpalette([10, 20, 30, 200, 100, 50])
    one_image.putdata([0, 1])
    data = make_file(one_image, file_format, transparency=0)
    np.testing.assert_array_equal(decode(data), [[[255, 255, 255], [200, 100, 50]]])


def test_a_palette_with_alpha_per_colour_is_laid_over_white() -> None:
    one_image = Image.new("P", (3, 1))
    one_image.putpalette([0, 0, 0, 200, 100, 50, 9, 9, 9])
    one_image.putdata([0, 1, 2])
    data = make_file(one_image, "PNG", transparency=bytes([51, 255, 0]))
    np.testing.assert_array_equal(decode(data), [[[204, 204, 204], [200, 100, 50], [255, 255, 255]]])


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_laid_over_white(file_format: str) -> None:
    pixels = np.array([[[0, 0, 0, 0], [0, 0, 0, 51], [200, 100, 50, 255]]], dtype=np.uint8)
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    data = make_file(Image.fromarray(pixels), file_format, **options)
    np.testing.assert_array_equal(decode(data), [[[255, 255, 255], [204, 204, 204], [200, 100, 50]]])


def test_grey_with_alpha_is_laid_over_white() -> None:
    pixels = np.array([[[0, 0], [100, 255], [0, 51]]], dtype=np.uint8)
    expected = np.repeat([[[255], [100], [204]]], 3, axis=2)
    np.testing.assert_array_equal(decode(make_file(Image.fromarray(pixels, "LA"), "PNG")), expected)


@pytest.mark.parametrize(("mode", "key", "shown"), [("L", 7, (100,) * 3), ("RGB", (7, 8, 9), (7, 100, 9))])
def test_a_colour_key_is_shown_white(mode: str, key: object, shown: tuple[int, int, int]) -> None:
    one_image = Image.new(mode, (2, 1), key)
    one_image.putpixel((1, 0), 100 if mode == "L" else (7, 100, 9))
    np.testing.assert_array_equal(decode(make_file(one_image, "PNG", transparency=key)), [[(255, 255, 255), shown]])


def test_one_bit_is_black_and_white() -> None:
    one_image = Image.new("1", (2, 1))
    one_image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decode(make_file(one_image, "PNG")), [[[0, 0, 0], [255, 255, 255]]])


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_a_16_bit_gradient_is_scaled_and_not_clipped(file_format: str) -> None:
    values = np.linspace(0, 65535, 300).round().astype(np.uint16)[None]
    grey = decode(make_file(Image.fromarray(values), file_format))[0]
    np.testing.assert_array_equal(grey, np.repeat(np.rint(values[0] / 257)[:, None], 3, axis=1))
    assert (np.diff(grey[:, 0].astype(int)) >= 0).all()
    assert len(np.unique(grey)) == 256


def test_a_dark_16_bit_image_stays_dark() -> None:
    values = np.linspace(0, 1000, 50).astype(np.uint16)[None]
    assert decode(make_file(Image.fromarray(values), "PNG")).max() == 4


def test_the_transparent_value_of_a_16_bit_image_is_shown_white() -> None:
    one_image = Image.fromarray(np.array([[1000, 1001, 25700]], dtype=np.uint16))
    data = make_file(one_image, "PNG", transparency=1000)
    np.testing.assert_array_equal(decode(data)[0, :, 0], [255, 4, 100])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 1, 100, 255], dtype=np.int32), [0, 1, 100, 255]),
        (np.array([-1000, 0, 1000], dtype=np.int32), [0, 128, 255]),
        (np.array([0, 2**30, 2**31 - 1], dtype=np.int32), [0, 128, 255]),
        (np.array([0, 0.2, 1], dtype=np.float32), [0, 51, 255]),
        (np.array([0, 1.6, 254.8], dtype=np.float32), [0, 2, 255]),
        (np.array([-0.25, 0, 0.25], dtype=np.float32), [0, 128, 255]),
        (np.array([500, 500], dtype=np.float32), [0, 0]),
    ],
)
def test_32_bit_grey_is_scaled_by_its_own_range_when_it_has_no_usual_one(values: np.ndarray, expected: list) -> None:
    grey = decode(make_file(Image.fromarray(values[None]), "TIFF"))[0, :, 0]
    np.testing.assert_array_equal(grey, expected)


def test_grey_that_is_not_finite_is_unreadable() -> None:
    values = np.array([[0, np.nan, 1]], dtype=np.float32)
    assert reason_of(make_file(Image.fromarray(values), "TIFF")) == "unreadable"


@pytest.mark.parametrize(("file_format", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_the_first_frame_of_an_animation_is_taken(file_format: str, options: dict) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ["red", "lime", "blue"]]
    data = make_file(frames[0], file_format, save_all=True, append_images=frames[1:], duration=100, **options)
    np.testing.assert_array_equal(decode(data), np.broadcast_to([255, 0, 0], (8, 8, 3)))


def test_an_empty_file_is_empty() -> None:
    assert reason_of(b"") == "empty"


@pytest.mark.parametrize(
    "data",
    [
        b"<html><body>404 Not Found</body></html>",
        b"a text file, no image\n",
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\0",
    ],
    ids=["html", "text", "svg", "heic", "wave", "postscript", "one byte"],
)
def test_a_file_of_another_kind_is_not_an_image(data: bytes) -> None:
    assert reason_of(data) == "not_an_image"


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {}),
    ],
)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99])
def test_a_file_cut_short_is_truncated(file_format: str, options: dict, share: float) -> None:
    data = make_file(make_noise(), file_format, **options)
    assert reason_of(data[: int(len(data) * share)]) == "truncated"


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "JPEG2000"])
def test_a_file_cut_anywhere_is_refused_or_whole_but_never_half_decoded(file_format: str) -> None:
    data = make_file(make_noise(24, 24), file_format)
    whole = decode(data)
    for num_bytes in range(1, len(data), 7):
        try:
            pixels = decode(data[:num_bytes])
        except BadImageError:
            continue
        np.testing.assert_array_equal(pixels, whole)


def test_a_jpeg_cut_inside_its_header_is_truncated() -> None:
    assert reason_of(make_file(make_noise(), "JPEG")[:10]) == "truncated"


def test_a_damaged_header_is_unreadable() -> None:
    data = bytearray(make_file(make_noise(), "PNG"))
    data[20] ^= 0xFF  # inside IHDR, whose checksum no longer holds
    assert reason_of(bytes(data)) == "unreadable"


def test_damaged_pixels_are_unreadable() -> None:
    data = bytearray(make_file(make_noise(), "PNG"))
    data[60:90] = bytes(30)  # inside the compressed pixels
    assert reason_of(bytes(data)) == "unreadable"


def test_an_image_with_too_many_pixels_is_refused_and_one_at_the_limit_is_not() -> None:
    data = make_file(make_image(48, 32), "PNG")
    assert reason_of(data, max_pixels=48 * 32 - 1) == "too_many_pixels"
    assert decode_image(data, max_pixels=48 * 32).size == (48, 32)


def test_the_size_is_checked_before_anything_is_decoded() -> None:
    # The pixels of this file are missing: decoding would find it truncated.
    assert reason_of(make_png_of_size(2000, 2000), max_pixels=MAX_PIXELS) == "too_many_pixels"
    assert reason_of(make_png_of_size(200, 200), max_pixels=MAX_PIXELS) != "too_many_pixels"


def test_the_limit_is_the_callers_whatever_pillows_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data = make_file(make_image(48, 32), "PNG")
    assert decode_image(data, max_pixels=48 * 32).size == (48, 32)
    assert read_size(data, max_pixels=48 * 32) == (48, 32)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("size", [(48, 32), (30_000, 30_000)])
def test_the_header_alone_is_enough_to_refuse_too_many_pixels(size: tuple[int, int]) -> None:
    data = make_png_of_size(*size)
    with pytest.raises(BadImageError, match="raise max_pixels") as caught:
        read_size(data, max_pixels=48 * 32 - 1)
    assert caught.value.reason == reason_of(data, max_pixels=48 * 32 - 1) == "too_many_pixels"


def make_canvas(width: int, height: int) -> bytes:
    """A WebP animation with a canvas of this size and a frame of 8x8 pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return name + struct.pack("<I", len(body)) + body

    def size(width: int, height: int) -> bytes:
        return (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")

    frame = bytes(6) + size(8, 8) + bytes(4) + make_file(make_image(8, 8), "WEBP")[12:]
    chunks = chunk(b"VP8X", b"\2\0\0\0" + size(width, height)) + chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", frame)
    return chunk(b"RIFF", b"WEBP" + chunks)


def test_the_canvas_of_an_animation_is_checked_before_the_decoder_allocates_it(monkeypatch) -> None:
    assert decode(make_canvas(20, 10)).shape == (10, 20, 3)
    monkeypatch.setattr(Image, "open", None)
    assert reason_of(make_canvas(1001, 1000)) == "too_many_pixels"


def test_a_frame_larger_than_its_animation_is_refused() -> None:
    screen, frame = struct.pack("<HHBBB", 8, 8, 0x80, 0, 0), struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0)
    # Disposal method 2 makes Pillow fill the frame's area when it opens the file.
    control = b"!\xf9\x04\x08\0\0\0\0"
    data = b"GIF89a" + screen + bytes(6) + control + b"," + frame + b"\x02\x02D\x01\0;"
    assert reason_of(data) == "too_many_pixels"


def test_a_warning_of_pillow_does_not_leak_and_the_filters_stay_as_they_were() -> None:
    # An acTL chunk of no frames: Pillow warns of an invalid APNG and shows the default image.
    plain = make_file(make_image(), "PNG")
    chunk = b"acTL" + bytes(8)
    data = plain[:33] + struct.pack(">I", 8) + chunk + struct.pack(">I", zlib.crc32(chunk)) + plain[33:]
    with pytest.warns(UserWarning, match="Invalid APNG"):
        Image.open(io.BytesIO(data)).load()
    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(decode(data), np.asarray(make_image()))
    assert caught == []
    assert warnings.filters == filters


def test_decoding_leaves_pillows_settings_alone() -> None:
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    data = make_file(make_noise(), "JPEG")
    decode(data)
    reason_of(data[:500])
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == before == (False, before[1])


def plain(image: Image.Image) -> np.ndarray:
    """What `shown` computes strip by strip, from the whole image at once."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        lowest, highest = values.min(), values.max()
        if image.mode.startswith("I;16") or image.format == "PPM":
            values = values * (255 / 65535)
        elif not 0 <= lowest <= highest <= 255:
            values = (values - lowest) * (255 / (highest - lowest))
        return np.repeat(np.rint(values).astype(np.uint8)[..., None], 3, axis=2)
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    rgba = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))


def deep(dtype: type, scale: float) -> Image.Image:
    return Image.fromarray((np.asarray(make_noise().convert("I")) * scale).astype(dtype))


@pytest.mark.parametrize("strip_pixels", [1, 200, 1 << 18])
@pytest.mark.parametrize(
    ("image", "file_format"),
    [
        (make_noise().convert("1"), "PNG"),
        (make_noise().convert("L"), "PNG"),
        (make_noise().convert("LA"), "PNG"),
        (make_noise().quantize(9), "PNG"),
        (make_noise(), "PNG"),
        (Image.merge("RGBA", (*make_noise().split(), make_noise().getchannel(0))), "PNG"),
        (deep(np.uint16, 250), "PNG"),
        (deep(np.uint16, 250), "TIFF"),
        (deep(np.uint16, 250), "PPM"),
        (deep(np.int32, -5), "TIFF"),
        (deep(np.float32, 1.7), "TIFF"),
        (make_noise().convert("CMYK"), "TIFF"),
        (Image.merge("LAB", make_noise().split()), "TIFF"),
        (make_noise().convert("YCbCr"), "JPEG"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "mode", None),
)
def test_strips_of_any_size_give_the_pixels_of_the_whole(image, file_format, strip_pixels, monkeypatch) -> None:
    monkeypatch.setattr(shown, "_STRIP_PIXELS", strip_pixels)
    data = make_file(image, file_format)
    np.testing.assert_array_equal(decode(data), plain(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["transparent", "turned"])
def test_strips_keep_the_transparent_value_and_the_orientation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    options = {"transparency": 1000} if kind == "transparent" else {"exif": exif}
    values = np.arange(990, 1010, dtype=np.uint16).repeat(3).reshape(20, 3) * (1 if kind == "transparent" else 50)
    data = make_file(Image.fromarray(values), "PNG", **options)
    whole = decode(data)
    monkeypatch.setattr(shown, "_STRIP_PIXELS", 4)
    np.testing.assert_array_equal(decode(data), whole)
    assert ((whole == 255).sum() == 9) if kind == "transparent" else whole.shape == (3, 20, 3)


def make_memory_files() -> dict[str, bytes]:
    """Files whose conversion or decoder takes much memory, 2000x1500 pixels each."""
    noise = make_noise(2000, 1500)
    files = {
        "PNG I;16": make_file(Image.fromarray(np.asarray(noise.convert("L")).astype(np.uint16) * 256), "PNG"),
        "PNG RGBA": make_file(Image.merge("RGBA", (*noise.split(), noise.getchannel(0))), "PNG", compress_level=1),
        "TIFF F": make_file(noise.convert("F"), "TIFF"),
        "JPEG CMYK": make_file(noise.convert("CMYK"), "JPEG", progressive=True),
        "WEBP": make_file(noise, "WEBP", method=0),
    }
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    return files | {"JPEG turned": make_file(noise, "JPEG", exif=exif)}


MEASURE = """
import ctypes, io, pickle, sys
from PIL import Image
from meteor.image.decode import _needed_bytes, decode_image

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

decode_image(open(sys.argv[2], "rb").read(), max_pixels=10**8)
for name, data in pickle.load(open(sys.argv[1], "rb")).items():
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    decode_image(data, max_pixels=10**8)
    print(name, resident("VmHWM") - before, _needed_bytes(Image.open(io.BytesIO(data))) + len(data), sep="|")
"""


def test_no_decoder_takes_more_memory_than_it_asked_for(tmp_path: Path) -> None:
    (tmp_path / "files").write_bytes(pickle.dumps(make_memory_files()))
    (tmp_path / "small").write_bytes(make_file(make_noise(), "PNG"))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "files"), str(tmp_path / "small")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 6
    for name, taken, asked in (line.split("|") for line in lines):
        # The peak counts whole pages of libraries too, which are loaded at their first use.
        assert int(taken) <= int(asked) + (4 << 20), name


def test_a_tile_larger_than_its_image_is_counted() -> None:
    with Image.open(io.BytesIO(make_file(make_noise(), "TIFF"))) as image:
        asked = decoding._needed_bytes(image)
        image.tag_v2[322], image.tag_v2[323] = 640, 640
        assert decoding._needed_bytes(image) == 100 * asked


def test_a_jpeg_of_several_pictures_is_counted_as_a_jpeg() -> None:
    # Pillow names the format of these files MPO, though its decoder is JPEG's.
    several = make_file(make_noise(), "MPO", save_all=True, append_images=[make_noise()])
    needed = [
        decoding._needed_bytes(Image.open(io.BytesIO(data))) for data in (several, make_file(make_noise(), "JPEG"))
    ]
    assert needed[0] == needed[1]


def test_threads_wait_until_the_images_of_others_leave_enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_file(make_noise(), "PNG")
    num_bytes = 64 * 64 * decoding._OTHER_BYTES_PER_PIXEL + len(data)
    budget = ByteBudget(2 * num_bytes)
    monkeypatch.setattr(decoding, "_DECODING", budget)
    inside, most, lock = 0, 0, threading.Lock()

    def use(number: int) -> None:
        nonlocal inside, most
        with decoded(data, max_pixels=MAX_PIXELS):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.001)
            with lock:
                inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(40)))
    assert most == 2
    # A file that cannot be decoded gives its part back as well.
    assert reason_of(data[:5000]) == "truncated"
    with budget.hold(budget.num_bytes):
        pass


def test_the_error_tells_the_value_and_travels_between_processes() -> None:
    with pytest.raises(BadImageError, match="48x32, 1536 pixels, and the limit is 1000") as caught:
        decode_image(make_file(make_image(), "PNG"), max_pixels=1000)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.reason, str(copy)) == (caught.value.reason, str(caught.value))


@pytest.mark.parametrize(
    "data", [b"a text file", make_file(make_noise(), "PNG")[:20], make_file(make_noise(), "JPEG")[:10]]
)
def test_the_same_bad_file_gives_the_same_message_every_time(data: bytes) -> None:
    with pytest.raises(BadImageError, match=f"{len(data)} bytes") as first:
        decode_image(data, max_pixels=MAX_PIXELS)
    with pytest.raises(BadImageError) as second:
        decode_image(data, max_pixels=MAX_PIXELS)
    assert str(first.value) == str(second.value)
    assert "BytesIO" not in str(first.value)


def test_a_limit_below_one_pixel_is_refused() -> None:
    with pytest.raises(SettingsError, match="max_pixels"):
        decode_image(b"", max_pixels=0)
