"""The sample table: everything a training worker needs of the data set, planned once on the driver, stored with the run.

To train, workers read this table and the feature cache; they open no annotation file, and with cached features no image.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meteor import storage
from meteor.constants import GROUPING_TOKENS_PER_SUB_IMAGE, IGNORE_INDEX
from meteor.data.collate import ImageLayout, VisualTokenBudget, cut_text, num_image_tokens
from meteor.data.order import Part
from meteor.data.samples import Sample, SampleProblem
from meteor.errors import BadImageError, DataError, TokenisationError
from meteor.image.pixels import PixelSettings
from meteor.text.tokens import TokenisedSample

_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("turns", pa.list_(pa.int16())),
        ("image_keys", pa.list_(pa.string())),
        ("num_sub_images", pa.int32()),
        ("num_visual_tokens", pa.int32()),
        ("num_text_tokens", pa.int32()),
        ("grouping_length", pa.int32()),
    ]
)


_PARTS = b"parts"


@dataclass(frozen=True)
class IndexedImage:
    """What the dataset index says about one image."""

    image_key: str
    width: int
    height: int
    reason: str  # "" where the image is good


@dataclass(frozen=True)
class Exclusion:
    """A sample that does not take part, and why."""

    sample_id: str
    reason: str
    message: str


class SampleTable:
    """Rows of tokens, labels and image keys; opened by every worker of a run."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        # Tables of earlier releases have no turns; only a text-guided sampler needs them.
        names = [name for name in ("input_ids", "labels", "turns", "image_keys") if name in table.column_names]
        self._columns = {name: table.column(name).combine_chunks() for name in names}
        # What batches are made by, whatever the projector; and what they really take.
        self.grouping_lengths: list[int] = table.column("grouping_length").to_pylist()
        visual, text = (table.column(f"num_{kind}_tokens").to_numpy() for kind in ("visual", "text"))
        self.lengths: list[int] = (visual + text).tolist()
        self.num_sub_images: list[int] = table.column("num_sub_images").to_pylist()
        self.sample_ids: list[str] = table.column("sample_id").to_pylist()
        # Rows of one file stand together; what each file weighs is for the order to know.
        stored = (table.schema.metadata or {}).get(_PARTS)
        self.parts = [Part(*part) for part in json.loads(stored)] if stored else [Part(len(self))]

    def __len__(self) -> int:
        return self._table.num_rows

    def tokens(self, position: int) -> TokenisedSample:
        """Tokens and labels of a sample, one placeholder an image."""
        names = [name for name in ("input_ids", "labels", "turns") if name in self._columns]
        return TokenisedSample(**{name: self._columns[name][position].as_py() for name in names})

    def image_keys(self, position: int) -> list[str]:
        return self._columns["image_keys"][position].as_py()

    def num_answer_tokens(self, position: int) -> int:
        """Labels that the loss counts; the first token of a row has nothing before it and is never one."""
        labels = self._columns["labels"][position].values.to_numpy()
        return int((labels != IGNORE_INDEX).sum())

    def totals(self) -> dict[str, int]:
        """Counts for plans and summaries; the separators after slices are text, as in `Batch.num_text_tokens`."""
        names = ("sub_images", "visual_tokens", "text_tokens")
        return {
            "samples": len(self),
            **{name: int(self._table.column(f"num_{name}").to_numpy().sum()) for name in names},
            "images": len(self.all_image_keys()),
            "distinct_images": len(set(self.all_image_keys())),
        }

    def all_image_keys(self) -> list[str]:
        return self._columns["image_keys"].flatten().to_pylist()

    def write(self, uri: str) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(self._table, sink, compression="zstd")
        storage.write_bytes(uri, sink.getvalue().to_pybytes())

    @classmethod
    def mixture(cls, tables: Sequence["SampleTable"], weights: Sequence[float]) -> "SampleTable":
        """The rows of several tables, each with its weight; see `meteor.data.order.epoch_samples`."""
        joined = pa.concat_tables([one._table.replace_schema_metadata(None) for one in tables])
        parts = [(len(table), weight) for table, weight in zip(tables, weights, strict=True)]
        return cls(joined.replace_schema_metadata({_PARTS: json.dumps(parts)}))

    @classmethod
    def read(cls, uri: str) -> "SampleTable":
        return cls(pq.read_table(pa.BufferReader(storage.read_bytes(uri))))


@dataclass(frozen=True)
class TablePlan:
    """A sample table and what did not get into it."""

    table: SampleTable
    excluded: tuple[Exclusion, ...]
    num_cut: int

    @classmethod
    def mixture(cls, plans: Sequence["TablePlan"], weights: Sequence[float]) -> "TablePlan":
        """Several files' as one; see `SampleTable.mixture`."""
        return cls(
            SampleTable.mixture([plan.table for plan in plans], weights),
            tuple(exclusion for plan in plans for exclusion in plan.excluded),
            sum(plan.num_cut for plan in plans),
        )

    def reasons(self) -> dict[str, int]:
        """Number of excluded samples by reason."""
        return dict(Counter(exclusion.reason for exclusion in self.excluded))


def plan_table(
    samples: Sequence[Sample],
    problems: Sequence[SampleProblem],
    images: Mapping[str, IndexedImage],
    *,
    tokenise: Callable[[Sample], TokenisedSample],
    budget: VisualTokenBudget,
    pixels: PixelSettings,
    max_length: int,
    sub_images: str = "all",
) -> TablePlan:
    """Tokenise every sample, lay out its images, cut its text to ``max_length``.

    Args:
        samples: in the order of the annotation file.
        problems: samples that could not be read; they are carried into the exclusions.
        images: image name as samples give it -> what the dataset index knows.
        tokenise: a sample -> tokens with one placeholder an image.
        budget: patch grids -> visual tokens of each sub-image.
        pixels: slicing, and which aspect ratios are refused.
        max_length: tokens of a sample; only text is cut.
        sub_images: ``global`` counts the global view alone.

    Raises:
        DataError: an image is not in the index.
    """
    excluded = [Exclusion(problem.sample_id, problem.reason, problem.message) for problem in problems]
    rows: list[dict[str, Any]] = []
    num_cut = 0
    for sample in samples:
        try:
            layouts = [_layout(sample, name, images, pixels) for name in sample.images]
        except BadImageError as error:
            excluded.append(Exclusion(sample.id, error.reason, str(error)))
            continue
        used = [layout.only_global() for layout in layouts] if sub_images == "global" else layouts
        image_length = sum(num_image_tokens(layout, budget) for layout in used)
        try:
            tokens = tokenise(sample)
        except TokenisationError as error:
            excluded.append(Exclusion(sample.id, "tokenisation", str(error)))
            continue
        # The grouping length counts all text and all sub-images, whatever is trained on: variants share their batches.
        num_text = len(tokens.input_ids) - len(layouts)
        grouping_length = num_text + GROUPING_TOKENS_PER_SUB_IMAGE * sum(len(layout.patch_grids) for layout in layouts)
        is_cut = num_text + image_length > max_length
        if is_cut:
            tokens = cut_text(tokens, max_length - image_length)
            if all(label == IGNORE_INDEX for label in tokens.labels):
                message = (
                    f"its images take {image_length} of {max_length} tokens and its question the rest: no room for an "
                    "answer; raise max_length or keep fewer visual tokens"
                )
                excluded.append(Exclusion(sample.id, "too_long", message))
                continue
        num_cut += is_cut
        keys = [images[name].image_key for name in sample.images]
        rows.append({**_row(sample.id, tokens, keys, used, budget), "grouping_length": grouping_length})
    return TablePlan(SampleTable(pa.Table.from_pylist(rows, _SCHEMA)), tuple(excluded), num_cut)


def _row(
    sample_id: str,
    tokens: TokenisedSample,
    image_keys: list[str],
    layouts: Sequence[ImageLayout],
    budget: VisualTokenBudget,
) -> dict[str, Any]:
    num_visual = sum(sum(budget(layout.patch_grids)) for layout in layouts)
    num_separators = sum(num_image_tokens(layout, budget) for layout in layouts) - num_visual
    return {
        "sample_id": sample_id,
        "input_ids": tokens.input_ids,
        "labels": tokens.labels,
        "turns": tokens.turns,
        "image_keys": image_keys,
        # Those that the projector is given.
        "num_sub_images": sum(count > 0 for layout in layouts for count in budget(layout.patch_grids)),
        "num_visual_tokens": num_visual,
        "num_text_tokens": len(tokens.input_ids) - len(layouts) + num_separators,
    }


def _layout(sample: Sample, name: str, images: Mapping[str, IndexedImage], pixels: PixelSettings) -> ImageLayout:
    image = images.get(name)
    if image is None:
        raise DataError(f"sample {sample.id!r}: image {name!r} is not in the dataset index; run cache_features first")
    if image.reason:
        raise BadImageError(image.reason, f"image {name!r} is quarantined: {image.reason}")
    plan = pixels.plan(image.width, image.height)
    return ImageLayout(plan.grid, plan.patch_grids)
