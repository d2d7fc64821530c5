"""Workload of benchmarks/train.py: images and samples like those of LLaVA's mixture, a cache, and a model."""

import hashlib
import io
import random
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from meteor.cache import CacheIdentity, FeatureCache, commit, create_cache, encode_row, write_feature_file
from meteor.cache.calibration import open_codec
from meteor.constants import CLIP_MEAN, CLIP_STD, IGNORE_INDEX, IMAGE_PLACE
from meteor.data.collate import Batch, collate
from meteor.data.indexed_images import IndexedImage, IndexedImages
from meteor.data.order import CountedBatch
from meteor.data.sample_sets import SampleSet
from meteor.data.samples import Sample
from meteor.data.table import SampleTable
from meteor.data.table_plan import plan_table
from meteor.data.token_table import TokenTable
from meteor.features import ImageFeatures
from meteor.image.budget import visual_token_budget
from meteor.image.pixels import PixelSettings, slice_bytes
from meteor.image.transform import normalise_batch
from meteor.model import MeteorConfig, MeteorForConditionalGeneration
from meteor.model.image_processing import pack_pixels
from meteor.text.batches import TokenBatch
from meteor.text.tokenizer import VisualTokens
from meteor.text.tokens import TokenisedSample
from meteor.vision.encode_images import encode_sliced
from meteor.vision.encoder import FrozenEncoder

# Widths and heights of typical images of COCO, GQA and TextVQA.
SIZES = [(640, 480), (640, 427), (500, 375), (480, 640), (1024, 768), (427, 640), (640, 480), (336, 336)]
SEPARATORS = VisualTokens(image_id=32000, slice_id=29892, row_id=13)
PIXELS = PixelSettings()

# Shapes of the language model (Llama's) and of the vision encoder (CLIP's), by name.
_CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_CLIP_SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
SHAPES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "tiny": (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2},
    ),
    "small": (
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6},
        _CLIP_SMALL,
    ),
    "1b": (
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
        _CLIP_LARGE,
    ),
    "7b": (
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        _CLIP_LARGE,
    ),
}


@dataclass(frozen=True)
class Work:
    """Samples of a stage, their images as file bytes and as a feature cache, and the model."""

    table: SampleTable
    cache: FeatureCache
    shown_images: dict[str, bytes]
    model: MeteorForConditionalGeneration
    collate: Callable[..., Batch]


def make_identity(dtype: torch.dtype) -> CacheIdentity:
    return CacheIdentity(
        encoder_digest="0" * 64,
        encoder_dtype=str(dtype).removeprefix("torch."),
        select_layer=-2,
        preprocessing={"mean": CLIP_MEAN, "std": CLIP_STD, "rescale": "1/255"},
        slicing={"max_slices": PIXELS.max_slices, "resolution": PIXELS.resolution, "patch_size": PIXELS.patch_size},
    )


def make_model(
    shape: str, projector: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> MeteorForConditionalGeneration:
    """Make a model with random weights and a vision tower on the device."""
    torch.manual_seed(0)
    llm, clip = SHAPES[shape]
    config = MeteorConfig(
        text_config={"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, **llm},
        vision_config=CLIPVisionConfig(**clip, image_size=336, patch_size=14).to_dict(),
        projector=projector,
        cache_identity=make_identity(dtype).to_dict(),
    )
    torch.set_default_dtype(dtype)
    with device:
        model = MeteorForConditionalGeneration(config, vision_tower=True)
    torch.set_default_dtype(torch.float32)
    return model


def make_work(folder: Path, shape: str, projector: dict[str, Any], num_samples: int, device: torch.device) -> Work:
    """Make the workload, in bfloat16 on a GPU and in float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_model(shape, projector, device, dtype)
    shown_images = {hashlib.sha256(data).hexdigest(): data for data in map(_jpeg, range(num_samples))}
    cache = _fill_cache(folder, make_identity(dtype), shown_images, model.vision_tower)
    settings = dict(projector)
    budget = visual_token_budget(settings.pop("name"), settings)
    return Work(
        table=_make_table(shown_images, budget),
        cache=cache,
        shown_images=shown_images,
        model=model,
        collate=partial(
            collate,
            budget=budget,
            visual_tokens=SEPARATORS,
            pad_id=0,
            vision_width=model.config.vision_config.hidden_size,
            select_layer=-2,
        ),
    )


def _jpeg(number: int) -> bytes:
    """Make a JPEG of coarse noise, whose file is about as large as a photo's."""
    width, height = SIZES[number % len(SIZES)]
    noise = np.random.default_rng(number).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _fill_cache(
    folder: Path, identity: CacheIdentity, shown_images: dict[str, bytes], tower: CLIPVisionModel
) -> FeatureCache:
    encoder = FrozenEncoder(tower, select_layer=-2, attention_layers=(-2,), digest=identity.encoder_digest)
    uri = create_cache(str(folder), identity, "float16")
    codec, rows = open_codec(uri), []
    for key, data in shown_images.items():
        rows.append(encode_row(encode_sliced([slice_bytes(data, key, PIXELS)], encoder)[0], codec))
    for start in range(0, len(rows), 32):
        write_feature_file(uri, rows[start : start + 32])
    commit(uri)
    return FeatureCache.open(uri)


def _make_table(shown_images: dict[str, bytes], budget: Callable[..., list[int]]) -> SampleTable:
    """Make a sample per image, with a few turns whose answers are about half the text, as in LLaVA's mixture."""
    chance = random.Random(0)

    def make_tokens() -> TokenisedSample:
        ids, labels = [1, IMAGE_PLACE, *(chance.randrange(3, 32000) for _ in range(40))], [IGNORE_INDEX] * 42
        for _ in range(chance.choice([1, 1, 2, 3, 5, 8])):
            for length, is_answer in (
                (chance.randint(8, 40), False),
                (min(int(chance.lognormvariate(3, 1)), 300) + 2, True),
            ):
                turn = [chance.randrange(3, 32000) for _ in range(length)]
                ids += turn
                labels += turn if is_answer else [IGNORE_INDEX] * length
        return TokenisedSample(ids, labels)

    images = {key: IndexedImage(key, *Image.open(io.BytesIO(data)).size, "") for key, data in shown_images.items()}
    samples = [Sample(key[:12], (key,), ()) for key in shown_images]
    tokens = TokenTable.of([TokenBatch.of([make_tokens() for _ in samples])])
    sample_set = SampleSet.of("generated", samples)
    plan = plan_table(sample_set, tokens, IndexedImages.of(images), budget=budget, pixels=PIXELS, max_length=2048)
    return plan.table


@dataclass(frozen=True)
class PixelBatch:
    """Batch with pixels instead of features, whose encoder runs inside the step."""

    batch: Batch
    pixels: torch.Tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batch, name)

    def to(self, device: torch.device) -> "PixelBatch":
        return PixelBatch(self.batch.to(device), self.pixels.to(device, non_blocking=True))

    def as_inputs(self) -> dict[str, Any]:
        inputs = self.batch.as_inputs()
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels", "num_slots", "grids")}
        return {**kept, "pixel_values": self.pixels}


def load_pixels(
    micro_batches: Iterable[CountedBatch], *, work: Work, num_threads: int, dtype: torch.dtype
) -> Generator[PixelBatch, None, None]:
    """Yield batches as usual loaders do: decode, slice, resize and normalise several samples' images at a time."""

    def prepare(position: int) -> tuple[tuple[TokenisedSample, list[ImageFeatures]], list[torch.Tensor]]:
        [key] = work.table.image_keys(position)
        sliced = slice_bytes(work.shown_images[key], key, PIXELS)
        grids = sliced.plan.patch_grids
        # Collating uses only the layout of these features; the values are never read.
        stand_in = ImageFeatures(
            image_key=key,
            width=sliced.width,
            height=sliced.height,
            grid=sliced.plan.grid,
            patch_grids=grids,
            attention_layers=(-2,),
            features=[torch.zeros(rows * columns, 1) for rows, columns in grids],
            cls_attention=[torch.zeros(1, rows * columns) for rows, columns in grids],
            cls=torch.zeros(len(grids), 1),
        )
        pixels = normalise_batch(sliced.sub_images, CLIP_MEAN, CLIP_STD, device=torch.device("cpu"), dtype=dtype)
        return (work.table.tokens(position), [stand_in]), list(pixels)

    with ThreadPoolExecutor(num_threads) as pool:
        for rows, _ in micro_batches:
            prepared = list(pool.map(prepare, [position for row in rows for position in row]))
            yield PixelBatch(
                work.collate([[sample] for sample, _ in prepared], vision_width=1),
                pack_pixels([sub_image for _, pixels in prepared for sub_image in pixels], PIXELS.patch_size),
            )
