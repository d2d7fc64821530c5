"""Batches from tokenised samples and cached features, with one sample per row or several packed into each row.

Letters: B rows, L sequence, S sub-images of all samples, P patches (largest), C vision width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.features import ImageFeatures
from meteor.text.tokenizer import VisualTokens
from meteor.text.tokens import TokenisedSample

PatchGrids = Sequence[tuple[int, int]]
VisualTokenBudget = Callable[[PatchGrids], list[int]]


@dataclass(frozen=True)
class ImageLayout:
    """Properties of an image that decide about its place in the prompt.

    Attributes:
        grid: slice grid (columns, rows), or None for an image without slices.
        patch_grids: (rows, columns) of patches in each sub-image, global view first.
    """

    grid: tuple[int, int] | None
    patch_grids: tuple[tuple[int, int], ...]

    def only_global(self) -> "ImageLayout":
        """Return the layout without the slices."""
        return ImageLayout(None, self.patch_grids[:1])


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass.

    Attributes:
        input_ids: (B, L) long; `VisualTokens.image_id` at every visual slot.
        attention_mask: (B, L) long, the number of the sample in its row, from 1; 0 at padding. A token attends to the
            earlier tokens of its own sample and to nothing else.
        labels: (B, L) long, `IGNORE_INDEX` outside answers.
        turns: (B, L) long, number of the turn within its sample (see `TokenisedSample`).
        image_numbers: (B, L) long, number of the image within its sample (see `TokenisedSample`).
        features: (S, P, C) in the cache's dtype, zero at padding; at least one sub-image, so that every batch, even a
            text-only batch, runs the projector on every rank.
        cls_attention: (S, P) float32.
        grids: (S, 2) long, patch rows and columns.
        num_slots: (S,) long, number of visual slots of each sub-image in ``input_ids``; sub-images without slots are left
            out.
        num_samples: samples in all rows; 0 for the batch that a worker without remaining samples gets.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    turns: torch.Tensor
    image_numbers: torch.Tensor
    features: torch.Tensor
    cls_attention: torch.Tensor
    grids: torch.Tensor
    num_slots: torch.Tensor
    num_samples: int

    @property
    def num_visual_tokens(self) -> int:
        return int(self.num_slots.sum())

    @property
    def num_text_tokens(self) -> int:
        return int((self.attention_mask > 0).sum()) - self.num_visual_tokens

    @property
    def num_squares(self) -> int:
        """Sum over samples of the squared number of tokens, to which the work of attention is proportional."""
        rows = torch.arange(len(self.attention_mask))[:, None] * (self.attention_mask.max() + 1)
        counts = torch.bincount((self.attention_mask + rows)[self.attention_mask > 0])
        return int((counts**2).sum())

    def to(self, device: torch.device | str) -> "Batch":
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in self.as_inputs().items()}
        return Batch(**tensors, num_samples=self.num_samples)

    def as_inputs(self) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of `MeteorForConditionalGeneration.forward`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_samples"}


def expand_images(
    sample: TokenisedSample, layouts: Sequence[ImageLayout], budget: VisualTokenBudget, visual_tokens: VisualTokens
) -> tuple[TokenisedSample, list[int]]:
    """Replace each image's single placeholder by its visual slots and separators (spec: the prompt, section 6).

    The global view comes first and has no separator. The slices follow row by row, each with a separator behind it: the
    row separator after the last slice of a row, else the slice separator. A sub-image for which the projector gives no
    tokens has no separator.

    Returns:
        The longer sample, and the number of slots of every sub-image in order.
    """
    longer = TokenisedSample([], [], [], [])
    num_slots: list[int] = []
    assert sample.input_ids.count(IMAGE_PLACE) == len(layouts), "one placeholder per image"
    images = enumerate(layouts, start=1)
    for place, (token, label, turn) in enumerate(zip(sample.input_ids, sample.labels, _turns_of(sample), strict=True)):
        if token != IMAGE_PLACE:
            _extend(longer, [token], label, turn, 0, visual_tokens.image_id)
            longer.spans.extend(sample.spans[place : place + 1])
            continue
        number, layout = next(images)
        slots = budget(layout.patch_grids)
        visual = [visual_tokens.image_id] * slots[0]
        for i, n in enumerate(slots[1:]):
            if n:
                assert layout.grid is not None
                last_of_row = (i + 1) % layout.grid[0] == 0
                visual += [visual_tokens.image_id] * n
                visual.append(visual_tokens.row_id if last_of_row else visual_tokens.slice_id)
        _extend(longer, visual, IGNORE_INDEX, turn, number, visual_tokens.image_id)
        longer.spans.extend([(0, 0)] * (len(visual) if sample.spans else 0))
        num_slots += slots
    return longer, num_slots


def _turns_of(sample: TokenisedSample) -> list[int]:
    return sample.turns or [0] * len(sample.input_ids)


def _extend(sample: TokenisedSample, tokens: Sequence[int], label: int, turn: int, number: int, image_id: int) -> None:
    """Append tokens; an image's separators get neither its number nor the turn's, its slots get both."""
    sample.input_ids.extend(tokens)
    sample.labels.extend([label] * len(tokens))
    is_own = [not number or token == image_id for token in tokens]
    sample.turns.extend(turn if own else 0 for own in is_own)
    sample.image_numbers.extend(number if own else 0 for own in is_own)


def num_image_tokens(layout: ImageLayout, budget: VisualTokenBudget) -> int:
    """Return the length of an image in the sequence: slots and separators."""
    slots = budget(layout.patch_grids)
    return sum(slots) + sum(1 for n in slots[1:] if n)


def collate(
    rows: Sequence[Sequence[tuple[TokenisedSample, Sequence[ImageFeatures]]]],
    *,
    budget: VisualTokenBudget,
    visual_tokens: VisualTokens,
    pad_id: int,
    vision_width: int,
    select_layer: int,
    sub_images: Literal["all", "global"] = "all",
    padding_side: Literal["left", "right"] = "right",
) -> Batch:
    """Pad rows to one batch; without any row the batch has weight zero but still touches every parameter.

    Args:
        rows: samples of each row; a sample is its tokens, with one placeholder per image, and the features of its images
            in order.
        budget: patch grids -> number of the projector's tokens for each sub-image (`meteor.image.budget`).
        visual_tokens: token ids of visual slots and of separators after slices and rows.
        pad_id: token id at padding.
        vision_width: width C of the features.
        select_layer: layer whose cached attention the projector gets.
        sub_images: ``global`` drops the slices.
        padding_side: ``left`` for generation, ``right`` for training.
    """
    expanded: list[list[TokenisedSample]] = []
    num_slots: list[int] = []
    parts: list[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]] = []
    for row in rows:
        expanded.append([])
        for sample, images in row:
            layouts = [ImageLayout(image.grid, tuple(image.patch_grids)) for image in images]
            if sub_images == "global":
                layouts = [layout.only_global() for layout in layouts]
            longer, slots = expand_images(sample, layouts, budget, visual_tokens)
            expanded[-1].append(longer)
            sub_images_of_sample = [
                part
                for image, layout in zip(images, layouts, strict=True)
                for part in _sub_images(image, layout.patch_grids, select_layer)
            ]
            # The projector need not read sub-images for which it makes no tokens.
            used = [(part, count) for part, count in zip(sub_images_of_sample, slots, strict=True) if count]
            parts += [part for part, _ in used]
            num_slots += [count for _, count in used]
    # Every rank must run every module in every step: collective operations would otherwise wait forever.
    if not expanded:
        expanded.append([TokenisedSample([pad_id], [IGNORE_INDEX], [0], [0])])
    if not parts:
        parts.append(empty_sub_image(vision_width))
        num_slots.append(0)
    features_SPC, cls_attention_SP = pad_sub_images(parts)
    return Batch(
        *pad_tokens(expanded, pad_id, padding_side),
        features=features_SPC,
        cls_attention=cls_attention_SP,
        grids=torch.tensor([grid for _, _, grid in parts]),
        num_slots=torch.tensor(num_slots),
        num_samples=sum(map(len, rows)),
    )


def _sub_images(
    image: ImageFeatures, patch_grids: PatchGrids, select_layer: int
) -> list[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]]:
    # A cache may hold the attention of several layers, and the projector reads that of its own layer.
    layer = image.attention_layers.index(select_layer)
    return [(image.features[i], image.cls_attention[i][layer], grid) for i, grid in enumerate(patch_grids)]


def empty_sub_image(vision_width: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Make a sub-image of one blank patch without a slot, which the projector gets in a batch without images."""
    return torch.zeros(1, vision_width), torch.ones(1), (1, 1)


def pad_sub_images(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sub-images to the largest number of patches.

    Args:
        parts: features (P_u, C), attention (P_u,) and grid of each sub-image.

    Returns:
        Features (S, P, C) in their own dtype and attention (S, P) in float32, zero at padding.
    """
    num_patches = max(features_PC.shape[0] for features_PC, _, _ in parts)
    features_SPC = parts[0][0].new_zeros(len(parts), num_patches, parts[0][0].shape[1])
    cls_attention_SP = features_SPC.new_zeros(len(parts), num_patches, dtype=torch.float32)
    for i, (features_PC, attention_P, _) in enumerate(parts):
        features_SPC[i, : features_PC.shape[0]] = features_PC
        cls_attention_SP[i, : attention_P.shape[0]] = attention_P
    return features_SPC, cls_attention_SP


def pad_tokens(
    rows: Sequence[Sequence[TokenisedSample]], pad_id: int, side: Literal["left", "right"]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad expanded samples to tensors of equal length.

    Returns:
        Token ids, attention mask, labels, turns and image numbers as in `Batch`, each (B, L) long.
    """
    lengths = [sum(len(sample.input_ids) for sample in row) for row in rows]
    input_ids = torch.full((len(rows), max(lengths)), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    turns, image_numbers = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        end = 0 if side == "right" else max(lengths) - lengths[i]
        for number, sample in enumerate(row, start=1):
            span = slice(end, end := end + len(sample.input_ids))
            input_ids[i, span] = torch.tensor(sample.input_ids)
            attention_mask[i, span] = number
            labels[i, span] = torch.tensor(sample.labels)
            turns[i, span] = torch.tensor(sample.turns)
            image_numbers[i, span] = torch.tensor(sample.image_numbers)
    return input_ids, attention_mask, labels, turns, image_numbers
