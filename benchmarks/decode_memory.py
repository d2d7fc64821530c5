"""Memory of decoding: `python benchmarks/decode_memory.py` prints the peak bytes per pixel for each kind of image file.

Each file is decoded in a process of its own, once by Pillow alone, once by the plain conversion that copies whole images
(`plain_decode`), and once by `decode_image`. The peak is the growth of the resident set, from Linux's /proc.
"""

import argparse
import hashlib
import io
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from meteor.image.decode import decode_image

# Tags of EXIF, and the orientation that is shown after a quarter turn clockwise.
_ORIENTATION, _DESCRIPTION, _TURNED = 0x0112, 0x010E, 6
_HEAD = ("file", "mode", "Pillow's decoder", "plain conversion", "decode_image", "pixels")


def main() -> None:
    """Print a row per kind of file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=4000, help="width and height of the images in pixels (4000)")
    parser.add_argument("--only", default="", help="measure only files whose name contains this text")
    arguments = parser.parse_args()
    print("| " + " | ".join(_HEAD) + " |\n|" + "---|" * len(_HEAD), flush=True)
    for name, data in make_files(arguments.side, arguments.only):
        peaks, digests = zip(*(_measure(decode, data) for decode in (_load, plain_decode, _decode)), strict=True)
        numbers = " | ".join(f"{peak / arguments.side**2:.1f}" for peak in peaks)
        verdict = "equal" if digests[1] == digests[2] else "DIFFERENT"
        with Image.open(io.BytesIO(data)) as image:
            print(f"| {name} | {image.mode} | {numbers} | {verdict} |", flush=True)


def make_files(side: int, only: str) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of a file of each kind, all of ``side`` x ``side`` pixels."""
    y, x = np.mgrid[0:side, 0:side].astype(np.uint16)
    colours = Image.fromarray(np.dstack([x % 251, y % 241, (x + y) % 239]).astype(np.uint8))
    deep = Image.fromarray(x * 13 + y)
    alpha = colours.convert("RGBA")
    alpha.putalpha(colours.getchannel("R"))
    exif = Image.Exif()
    exif[_ORIENTATION], exif[_DESCRIPTION] = _TURNED, "x" * 60_000
    shades = np.asarray(deep)
    kinds: dict[str, tuple[Callable[[], Image.Image], str, dict[str, object]]] = {
        "PNG 1": (lambda: colours.convert("1"), "PNG", {}),
        "PNG L": (lambda: colours.convert("L"), "PNG", {}),
        "PNG LA": (lambda: alpha.convert("LA"), "PNG", {}),
        "PNG P": (lambda: colours.quantize(64), "PNG", {}),
        "PNG RGB": (lambda: colours, "PNG", {}),
        "PNG RGBA": (lambda: alpha, "PNG", {}),
        "PNG I;16": (lambda: deep, "PNG", {}),
        "TIFF I": (lambda: Image.fromarray(shades.astype(np.int32)), "TIFF", {}),
        "TIFF F": (lambda: Image.fromarray(shades.astype(np.float32)), "TIFF", {}),
        "TIFF I;16, deflate": (lambda: deep, "TIFF", {"compression": "tiff_deflate"}),
        "TIFF CMYK": (lambda: colours.convert("CMYK"), "TIFF", {}),
        "TIFF LAB": (lambda: Image.merge("LAB", colours.split()), "TIFF", {}),
        "TIFF YCbCr, JPEG": (lambda: colours.convert("YCbCr"), "TIFF", {"compression": "jpeg"}),
        "JPEG": (lambda: colours, "JPEG", {}),
        "JPEG L": (lambda: colours.convert("L"), "JPEG", {}),
        "JPEG, 60 kB of EXIF, turned": (lambda: colours, "JPEG", {"exif": exif}),
        "JPEG, progressive": (lambda: colours, "JPEG", {"progressive": True}),
        "JPEG, progressive, 4:4:4": (lambda: colours, "JPEG", {"progressive": True, "subsampling": 0}),
        "JPEG CMYK, progressive": (lambda: colours.convert("CMYK"), "JPEG", {"progressive": True}),
        "JPEG 2000": (lambda: colours, "JPEG2000", {}),
        "JPEG 2000 RGBA": (lambda: alpha, "JPEG2000", {}),
        "WebP": (lambda: colours, "WEBP", {"method": 0}),
        "WebP, lossless, RGBA": (lambda: alpha, "WEBP", {"lossless": True, "method": 0}),
        "AVIF": (lambda: colours, "AVIF", {"speed": 10}),
        "AVIF RGBA": (lambda: alpha, "AVIF", {"speed": 10}),
        "GIF": (lambda: colours.quantize(64), "GIF", {}),
        "GIF, animated": (
            lambda: colours.quantize(64),
            "GIF",
            {"save_all": True, "append_images": [ImageOps.mirror(colours.quantize(64))]},
        ),
        "BMP": (lambda: colours, "BMP", {}),
        "PPM": (lambda: colours, "PPM", {}),
    }
    for name, (make, file_format, options) in kinds.items():
        if only in name:
            sink = io.BytesIO()
            make().save(sink, file_format, **options)
            yield name, sink.getvalue()


def plain_decode(data: bytes) -> Image.Image:
    """Decode with a copy of the whole image at each step and float64 for deep greyscale: the pixels to compare with."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        rgb = _plain_rgb(image)
        return rgb.transpose(Image.Transpose.ROTATE_270) if image.getexif().get(_ORIENTATION) == _TURNED else rgb


def _plain_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        lowest, highest = float(values.min()), float(values.max())
        is_16_bit = image.mode.startswith("I;16")
        scaled = values * (255 / 65535) if is_16_bit else (values - lowest) * (255 / (highest - lowest))
        return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _load(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _decode(data: bytes) -> Image.Image:
    return decode_image(data, max_pixels=1 << 40)


def _measure(decode: Callable[[bytes], Image.Image], data: bytes) -> tuple[int, str]:
    """Return the peak growth in bytes, and the digest of the pixels."""
    # A forked process would inherit free memory, and reuse it unseen.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(decode, data, sender))
    process.start()
    sender.close()
    peak_bytes, digest = receiver.recv()
    process.join()
    return peak_bytes, digest


def _child(decode: Callable[[bytes], Image.Image], data: bytes, sender: Connection) -> None:
    Image.init()
    Image.MAX_IMAGE_PIXELS = None
    # 5 resets the peak of the resident set to its present size.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes("VmRSS")
    image = decode(data)
    peak_bytes = _resident_bytes("VmHWM") - before
    sender.send((peak_bytes, hashlib.sha256(np.asarray(image).tobytes()).hexdigest()))


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
