"""Where the images of LLaVA's published data come from, by their names, and what is known to go wrong with them."""

import posixpath
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A folder of images that annotation files of the field name.

    Attributes:
        name: what reports call it: the folder, as the names spell it.
        pattern: matches the image names that belong to it.
        origin: where the images are to be had.
        trap: what is known to be missing or odd in it; "" if nothing.
    """

    name: str
    pattern: str
    origin: str
    trap: str = ""


OCR_VQA = Source(
    "ocr_vqa/images",
    r"(^|/)ocr_vqa/images/",
    "OCR-VQA's download script (loadDataset.py, https://ocr-vqa.github.io)",
    # https://github.com/haotian-liu/LLaVA/issues/1618
    "355 of the images that LLaVA's 665K mixture names can no longer be downloaded by the script, and it keeps the "
    ".gif ending of some images that the annotations name .jpg",
)

SOURCES = (
    Source(
        "coco/train2017",
        r"(^|/)coco/train2017/",
        "COCO train2017, http://images.cocodataset.org/zips/train2017.zip",
    ),
    Source(
        "gqa/images", r"(^|/)gqa/images/", "GQA images.zip, https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"
    ),
    OCR_VQA,
    Source(
        "textvqa/train_images",
        r"(^|/)textvqa/train_images/",
        "TextVQA train_val_images.zip, https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
    ),
    Source(
        "vg/VG_100K",
        r"(^|/)vg/VG_100K/",
        "Visual Genome part 1, https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
    ),
    Source(
        "vg/VG_100K_2",
        r"(^|/)vg/VG_100K_2/",
        "Visual Genome part 2, https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
    ),
    Source(
        "CC-595K",
        r"(^|/)GCC_train_\d+\.jpg$",
        "images.zip of https://huggingface.co/datasets/liuhaotian/LLaVA-CC3M-Pretrain-595K",
    ),
    Source(
        "LCS-558K",
        r"(^|/)\d{5}/\d{9}\.jpg$",
        "images.zip of https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
    ),
)

_COMPILED = tuple((re.compile(source.pattern), source) for source in SOURCES)


def find_source(image_name: str) -> Source:
    """The published source an image belongs to by its name, or one named after its first folder."""
    for pattern, source in _COMPILED:
        if pattern.search(image_name):
            return source
    if "://" in image_name or image_name.startswith("/"):
        folder = posixpath.dirname(image_name)
    else:
        folder = image_name.partition("/")[0] if "/" in image_name else "(no folder)"
    return Source(folder, "", "")


def other_spelling(image_name: str) -> str | None:
    """The name under which a missing image may lie instead: OCR-VQA's .gif for .jpg."""
    stem, ending = posixpath.splitext(image_name)
    return f"{stem}.gif" if ending == ".jpg" and find_source(image_name) is OCR_VQA else None
