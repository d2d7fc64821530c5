"""Sources of the images in LLaVA's published data, recognised by image names, with their known defects."""

import posixpath
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A published folder of images that annotation files refer to.

    Attributes:
        name: name in reports: the folder as image names spell it.
        pattern: regular expression that matches the image names of this source.
        origin: place from which the images can be downloaded.
        trap: known missing images or oddities; "" if there are none.
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

INSIDE = Source("(inside its files)", "", "")

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

# `meteor.data.sample_sets.inside_prefix`, and a fragment.
_NAMES_INSIDE = re.compile(r"@[0-9a-f]{16}/[^#]*#")
_COMPILED = tuple((re.compile(source.pattern), source) for source in SOURCES)


def find_source(image_name: str) -> Source:
    """Return the published source of an image by its name, or else a source named after the image's folder."""
    if _NAMES_INSIDE.match(image_name):
        return INSIDE
    for pattern, source in _COMPILED:
        if pattern.search(image_name):
            return source
    if "://" in image_name or image_name.startswith("/"):
        folder = posixpath.dirname(image_name)
    else:
        folder = image_name.partition("/")[0] if "/" in image_name else "(no folder)"
    return Source(folder, "", "")


def other_spelling(image_name: str) -> str | None:
    """Return the name under which a missing image may exist instead: OCR-VQA's .gif for .jpg."""
    stem, ending = posixpath.splitext(image_name)
    return f"{stem}.gif" if ending == ".jpg" and find_source(image_name) is OCR_VQA else None
