"""Entries of images in the dataset index, as planning reads them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class IndexedImage:
    """An image's entry in the dataset index.

    Attributes:
        image_key: the image's key.
        width: width in pixels.
        height: height in pixels.
        reason: reason why the image cannot be used, or "".
    """

    image_key: str
    width: int
    height: int
    reason: str


@dataclass(frozen=True, eq=False)
class IndexedImages:
    """Entries of images in the dataset index, as columns.

    Attributes:
        names: image names as samples spell them, each once.
        keys: image keys.
        widths, heights: (N,) int, in pixels.
        reasons: reason why each image cannot be used, "" for a good image.
    """

    names: pa.StringArray
    keys: pa.StringArray
    widths: np.ndarray
    heights: np.ndarray
    reasons: pa.StringArray

    @classmethod
    def of(cls, images: Mapping[str, IndexedImage]) -> "IndexedImages":
        """Make columns from a few images by name."""
        rows = list(images.values())
        return cls(
            pa.array(images, pa.string()),
            pa.array([row.image_key for row in rows], pa.string()),
            np.array([row.width for row in rows], np.int64),
            np.array([row.height for row in rows], np.int64),
            pa.array([row.reason for row in rows], pa.string()),
        )

    @classmethod
    def from_rows(cls, rows: pa.Table, quarantined: Mapping[str, str]) -> "IndexedImages":
        """Take columns from rows of the dataset index (`DatasetIndex.rows_named`).

        Args:
            rows: table with the columns name, image_key, width, height and reason.
            quarantined: image key -> reason why the encoder refused the image.
        """
        keys, reasons = rows["image_key"].combine_chunks(), rows["reason"].combine_chunks()
        if quarantined:
            places = pc.index_in(keys, value_set=pa.array(quarantined, pa.string()))
            refused = pa.array(quarantined.values(), pa.string()).take(places)
            reasons = pc.if_else(pc.equal(reasons, ""), pc.fill_null(refused, ""), reasons)
        widths, heights = (rows[name].to_numpy().astype(np.int64) for name in ("width", "height"))
        return cls(rows["name"].combine_chunks(), keys, widths, heights, reasons)
