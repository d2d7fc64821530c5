"""Images through a projector alone: sub-images are batched, and the results are divided by image again.

Letters: S sub-images of a batch, P patches and K kept tokens of a sub-image, D LLM width, C vision width, A attention
layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from meteor.data.collate import pad_sub_images
from meteor.errors import DataError
from meteor.features import ImageFeatures
from meteor.model.trained_projector import TrainedProjector
from meteor.projector import ProjectorOutput

_Part = tuple[torch.Tensor, torch.Tensor, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class ProjectedSubImage:
    """A projector's output for a sub-image, on the CPU.

    Attributes:
        tokens: (K, D) in the weights' dtype, in map order.
        indices: (K,), the patch (row * columns + column) of each token; None if tokens do not stand for single patches.
        visual_scores, native_scores: (P,) float32; None if the projector computes no scores.
    """

    tokens: torch.Tensor
    indices: torch.Tensor | None
    visual_scores: torch.Tensor | None
    native_scores: torch.Tensor | None


@dataclass(eq=False)
class ProjectedImage:
    """An image with its finished sub-images, the global view first."""

    image_key: str
    width: int
    height: int
    grid: tuple[int, int] | None
    patch_grids: tuple[tuple[int, int], ...]
    sub_images: list[ProjectedSubImage] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(sub_image.tokens) for sub_image in self.sub_images)


def project_images(
    projector: TrainedProjector, images: Iterable[ImageFeatures], *, batch_size: int = 32
) -> Iterator[ProjectedImage]:
    """Run the projector over images in order; a batch may hold sub-images of several images.

    Args:
        projector: the projector on its device.
        images: features with the attention of the projector's layer, read only when they are needed.
        batch_size: sub-images per batch. The projector treats each alone, so this number changes only the rounding.

    Raises:
        DataError: tokens are not finite.
    """
    parts = _sub_images(images, projector.select_layer)
    while batch := list(islice(parts, batch_size)):
        projected = _project([part for _, part in batch], projector)
        for (result, _), sub_image in zip(batch, projected, strict=True):
            if not sub_image.tokens.isfinite().all():
                raise DataError(
                    f"image {result.image_key}: its tokens are not finite in {sub_image.tokens.dtype}; use bfloat16 or "
                    "float32, and if that does not help, this projector's training went wrong"
                )
            result.sub_images.append(sub_image)
            if len(result.sub_images) == len(result.patch_grids):
                yield result


def _sub_images(images: Iterable[ImageFeatures], layer: int) -> Iterator[tuple[ProjectedImage, _Part]]:
    """Yield each sub-image in the form for `pad_sub_images`, with the image to which its result belongs."""
    for image in images:
        row = image.attention_layers.index(layer)
        result = ProjectedImage(image.image_key, image.width, image.height, image.grid, image.patch_grids)
        for features_PC, attention_AP, grid in zip(image.features, image.cls_attention, image.patch_grids, strict=True):
            yield result, (features_PC, attention_AP[row], grid)


@torch.inference_mode()
def _project(parts: Sequence[_Part], projector: TrainedProjector) -> list[ProjectedSubImage]:
    features_SPC, attention_SP = pad_sub_images(parts)
    grids_S2 = torch.tensor([grid for _, _, grid in parts])
    device = projector.device
    # The grids stay on the CPU, where projectors read them.
    output = projector.module(features_SPC.to(device), attention_SP.to(device), grids_S2)
    return _split(output, [rows * columns for _, _, (rows, columns) in parts])


def _split(output: ProjectorOutput, num_patches: Sequence[int]) -> list[ProjectedSubImage]:
    """Divide the projector's output by sub-image and remove the padding."""
    tokens_SKD, mask_SK = output.tokens.cpu(), output.mask.cpu()
    indices_SK = None if output.indices is None else output.indices.cpu()
    visual_SP, native_SP = (
        None if scores is None else scores.float().cpu() for scores in (output.visual_scores, output.native_scores)
    )
    return [
        ProjectedSubImage(
            tokens=tokens_SKD[i][mask_SK[i]],
            indices=None if indices_SK is None else indices_SK[i][mask_SK[i]],
            visual_scores=None if visual_SP is None else visual_SP[i, :count],
            native_scores=None if native_SP is None else native_SP[i, :count],
        )
        for i, count in enumerate(num_patches)
    ]
