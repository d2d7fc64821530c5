"""Comparison of two caches: their identities, their images, and the agreement of their numbers."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meteor.cache.calibration import open_codec
from meteor.cache.manifest import read_keys
from meteor.cache.merging import layer_sets
from meteor.cache.store import FeatureCache

_NUM_SHOWN = 5


@dataclass(frozen=True)
class CacheDiff:
    """Differences between two versions of caches, ``a`` and ``b``; image keys are sorted.

    Attributes:
        a, b: URI and version of each cache.
        identity: lines that describe differing fields of the identities, with a's value first.
        codecs: name of each codec, with the calibration's digest if the codec has one.
        num_common: number of images in both caches.
        only_in_a, only_in_b: keys of images in only one cache.
        other_layers: keys of images in both caches whose attention layers or their order differ.
        other_numbers: keys of images in both caches with equal layers but different bytes. None if identities or codecs
            differ, because different bytes are then no news.
    """

    a: str
    b: str
    identity: tuple[str, ...]
    codecs: tuple[str, str]
    num_common: int
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    other_layers: tuple[str, ...]
    other_numbers: tuple[str, ...] | None

    @property
    def equal(self) -> bool:
        """Whether both caches have equal images with equal bytes."""
        differences = self.identity or self.only_in_a or self.only_in_b or self.other_layers or self.other_numbers
        return not differences and self.codecs[0] == self.codecs[1]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return {"equal": self.equal, **asdict(self)}

    def to_text(self) -> str:
        """Return the differences as lines: counts, and the first few keys of each kind."""
        lines = [f"a  {self.a}", f"b  {self.b}"]
        lines += [f"identity: {difference}" for difference in self.identity]
        if self.codecs[0] != self.codecs[1]:
            lines.append(f"codec: {self.codecs[0]} != {self.codecs[1]}")
        lines.append(f"{self.num_common:,} images in both")
        lines += _line("only in a", self.only_in_a) + _line("only in b", self.only_in_b)
        lines += _line("with the attention of other layers", self.other_layers)
        lines += _line("with other numbers from the same settings, as other hardware gives", self.other_numbers or ())
        if self.equal:
            lines.append("no difference")
        elif self.other_numbers is None:
            lines.append("their numbers were not compared: identity or codec differs")
        return "\n".join(lines)


def diff_caches(a: FeatureCache, b: FeatureCache) -> CacheDiff:
    """Compare two caches by their key indexes and identities, without reading data files."""
    keys_a, keys_b = read_keys(a.uri, a.manifest), read_keys(b.uri, b.manifest)
    only_in_a, rows_a = _split(keys_a, keys_b)
    only_in_b, rows_b = _split(keys_b, keys_a)
    sets, _ = layer_sets(pa.concat_tables([rows_a, rows_b])["attention_layers"])
    same_layers = sets[: rows_a.num_rows] == sets[rows_a.num_rows :]
    identity = tuple(a.identity.differences(b.identity))
    codecs = (_codec_of(a), _codec_of(b))
    other_numbers = None
    if not identity and codecs[0] == codecs[1]:
        # The key index has the checksum of every payload, so data files need not be read.
        same_bytes = rows_a["crc32"].to_numpy() == rows_b["crc32"].to_numpy()
        other_numbers = _keys_where(rows_a, same_layers & ~same_bytes)
    return CacheDiff(
        a=f"{a.uri} version {a.version}",
        b=f"{b.uri} version {b.version}",
        identity=identity,
        codecs=codecs,
        num_common=rows_a.num_rows,
        only_in_a=only_in_a,
        only_in_b=only_in_b,
        other_layers=_keys_where(rows_a, ~same_layers),
        other_numbers=other_numbers,
    )


def _split(keys: pa.Table, others: pa.Table) -> tuple[tuple[str, ...], pa.Table]:
    """Return the image keys that the other index lacks, and the rows of shared keys, both sorted by key."""
    shared = pc.is_in(keys["image_key"], value_set=others["image_key"])
    return tuple(keys.filter(pc.invert(shared))["image_key"].to_pylist()), keys.filter(shared)


def _keys_where(rows: pa.Table, mask: np.ndarray) -> tuple[str, ...]:
    return tuple(rows["image_key"].filter(pa.array(mask)).to_pylist())


def _codec_of(cache: FeatureCache) -> str:
    codec = open_codec(cache.uri)
    return f"{codec.name} {codec.calibration_digest}".rstrip()


def _line(text: str, keys: tuple[str, ...]) -> list[str]:
    more = ", ..." if len(keys) > _NUM_SHOWN else ""
    return [f"{len(keys):,} {text}: {', '.join(keys[:_NUM_SHOWN])}{more}"] if keys else []
