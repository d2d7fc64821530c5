"""Drawing of scenes: shapes and a word on a muted, lightly textured background."""

import math

import numpy as np
from PIL import Image, ImageDraw

from meteor.synthetic.layout import Box, font, ink_box
from meteor.synthetic.scenes import Scene, SceneObject
from meteor.synthetic.streams import random_stream
from meteor.synthetic.vocabulary import COLOURS, TEXT

# Backgrounds are nearly grey and of medium brightness, so that every colour stands out, even black and white.
_BACKGROUND_LUMINANCE = (96, 150)
_BACKGROUND_TINT = 14
_BLOB_AMPLITUDE = 9
_GRAIN_AMPLITUDE = 5
_BLOBS_ALONG_SHORTER_SIDE = 5
# Shapes are drawn this many times larger and then reduced, because Pillow does not smooth edges.
_OVERSAMPLING = 4


def draw(scene: Scene) -> Image.Image:
    """Render a scene as an RGB image of its width and height; equal scenes give equal pixels."""
    image = Image.fromarray(draw_background(scene.width, scene.height, scene.texture_seed))
    for thing in scene.objects:
        if thing.shape == TEXT:
            _draw_text(image, thing)
        else:
            _draw_shape(image, thing)
    return image


def draw_background(width: int, height: int, seed: int) -> np.ndarray:
    """Draw a gradient between two muted colours with soft blobs and fine grain, (height, width, 3) uint8."""
    rng = random_stream(seed, "background")
    ends = rng.uniform(*_BACKGROUND_LUMINANCE, (2, 1)) + rng.uniform(-_BACKGROUND_TINT, _BACKGROUND_TINT, (2, 3))
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :] * math.cos(angle)
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None] * math.sin(angle)
    ramp = np.clip(0.5 + x + y, 0, 1)
    light = _blobs(rng, width, height) + rng.integers(-_GRAIN_AMPLITUDE, _GRAIN_AMPLITUDE + 1, (height, width))
    channels = [first + (second - first) * ramp + light for first, second in ends.T.astype(np.float32)]
    return np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)


def _blobs(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    unit = min(width, height) / _BLOBS_ALONG_SHORTER_SIDE
    coarse = rng.uniform(-1, 1, (max(2, round(height / unit)), max(2, round(width / unit)))).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) * _BLOB_AMPLITUDE


def _draw_shape(image: Image.Image, thing: SceneObject) -> None:
    x0, y0, x1, y1 = thing.box
    size = (x1 - x0, y1 - y0)
    mask = Image.new("L", (size[0] * _OVERSAMPLING, size[1] * _OVERSAMPLING))
    outline = shape_outline(thing.shape, (0, 0, mask.width - 1, mask.height - 1))
    pen = ImageDraw.Draw(mask)
    if thing.shape == "circle":
        pen.ellipse((0, 0, mask.width - 1, mask.height - 1), fill=255)
    else:
        pen.polygon(outline, fill=255)
    image.paste(COLOURS[thing.colour], (x0, y0), mask.resize(size, Image.Resampling.BOX))


def shape_outline(shape: str, box: Box) -> list[tuple[float, float]]:
    """Return the corners of a shape's polygon that fills ``box``."""
    x0, y0, x1, y1 = box
    if shape == "square":
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    if shape == "triangle":
        return [((x0 + x1) / 2, y0), (x1, y1), (x0, y1)]
    # A star has ten corners, every second closer to the centre, and is stretched to touch the box's sides.
    spikes = [(math.sin(i * math.pi / 5), -math.cos(i * math.pi / 5)) for i in range(10)]
    points = [(x * (0.45 if i % 2 else 1), y * (0.45 if i % 2 else 1)) for i, (x, y) in enumerate(spikes)]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    top, bottom = min(y for _, y in points), max(y for _, y in points)
    return [
        (x0 + (x - left) / (right - left) * (x1 - x0), y0 + (y - top) / (bottom - top) * (y1 - y0)) for x, y in points
    ]


def _draw_text(image: Image.Image, thing: SceneObject) -> None:
    left, top, _, _ = ink_box(thing.word, thing.font_px)
    pen, origin = ImageDraw.Draw(image), (thing.box[0] - left, thing.box[1] - top)
    pen.text(origin, thing.word, font=font(thing.font_px), fill=COLOURS[thing.colour])
