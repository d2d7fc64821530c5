"""Decoding: every mode as a viewer shows it, every bad file with its reason code. Files are made here with Pillow."""

import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from meteor.errors import BadImageError, SettingsError
from meteor.image.decode import _pillow_warnings, decode_image

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


@pytest.mark.parametrize("size", [(10_000, 10_000), (30_000, 30_000)], ids=["warning", "error"])
def test_pillows_own_limit_is_the_same_reason(size: tuple[int, int]) -> None:
    assert reason_of(make_png_of_size(*size), max_pixels=10**12) == "too_many_pixels"


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


def test_two_threads_that_overlap_leave_the_warning_filters_as_they_were() -> None:
    # In the order in which two threads can meet: the first to enter is the first to leave.
    filters = list(warnings.filters)
    first, second = _pillow_warnings.tamed(), _pillow_warnings.tamed()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert warnings.filters != filters
    second.__exit__(None, None, None)
    assert warnings.filters == filters


def test_decoding_leaves_pillows_settings_alone() -> None:
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    data = make_file(make_noise(), "JPEG")
    decode(data)
    reason_of(data[:500])
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == before == (False, before[1])


def test_the_error_tells_the_value_and_travels_between_processes() -> None:
    with pytest.raises(BadImageError, match="48x32, 1536 pixels, and the limit is 10") as caught:
        decode_image(make_file(make_image(), "PNG"), max_pixels=10)
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
