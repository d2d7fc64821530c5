"""Features in memory for images of a dialogue or of a batch of questions, each encoded once."""

from collections.abc import Generator, Iterable

import torch
from PIL import Image

from meteor.features import ImageFeatures
from meteor.image.pixels import SlicedImage
from meteor.image.shown import as_shown
from meteor.image.transform import slice_image
from meteor.model import MeteorForConditionalGeneration, MeteorProcessor
from meteor.vision.encode_images import encode_sliced


class ShownImages:
    """Feature source (`meteor.features.FeatureSource`) for images that a finished model gets directly.

    Args:
        model: the model with its vision tower.
        processor: the model's processor, which defines the slicing.
    """

    def __init__(self, model: MeteorForConditionalGeneration, processor: MeteorProcessor) -> None:
        self._encoder, self._pixels = model.frozen_encoder(), processor.image_processor.pixels
        self._features: dict[str, ImageFeatures] = {}

    def add(self, key: str, image: Image.Image) -> ImageFeatures:
        """Slice and encode an image unless its key is known.

        Raises:
            BadImageError: the image's aspect ratio is too extreme, or the encoder's output is not finite.
        """
        if key not in self._features:
            # Cameras store the rotation apart from the pixels; slicing needs the image as a viewer shows it.
            image = as_shown(image)
            plan = self._pixels.plan(image.width, image.height)
            sliced = SlicedImage(key, image.width, image.height, plan, tuple(slice_image(image, plan)))
            with torch.inference_mode():
                [self._features[key]] = encode_sliced([sliced], self._encoder)
        return self._features[key]

    def get(self, image_key: str) -> ImageFeatures:
        return self._features[image_key]

    def prefetch(
        self, keys: Iterable[str], *, num_threads: int = 1, max_bytes: int = 0
    ) -> Generator[ImageFeatures, None, None]:
        """Yield the features in order; nothing is read ahead, as they are in memory."""
        yield from map(self.get, keys)
