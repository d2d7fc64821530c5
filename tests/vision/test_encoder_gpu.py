"""The packed encoder on a CUDA device against the eager tower in float32, and its behaviour at the end of memory."""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from meteor.constants import CLIP_MEAN, CLIP_STD
from meteor.image.transform import normalise, normalise_batch
from meteor.vision.encoder import FrozenEncoder
from meteor.vision.memory import bytes_per_token

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]
SIZES = [(336, 336), (252, 448), (448, 252), (336, 336), (14, 28), (196, 560), (252, 448)] * 3
# Largest difference over the largest value of the truth; the residual stream is rounded at each of 24 additions.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def make_tower(**options) -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    return CLIPVisionModel._from_config(config, **options).eval().cuda()


def make_pixels():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, height, width, generator=generator).cuda() for height, width in SIZES]


@pytest.fixture(autouse=True)
def _exact_float32():
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@torch.no_grad()
def test_mixed_grids_equal_the_eager_float32_tower(dtype):
    pixels, eager = make_pixels(), make_tower(attn_implementation="eager")
    got = FrozenEncoder(make_tower().to(dtype)).encode(pixels)
    for one, pixels_3HW in zip(got, pixels, strict=True):
        truth = eager(
            pixels_3HW[None], interpolate_pos_encoding=True, output_hidden_states=True, output_attentions=True
        )
        for value, expected in (
            (one.features, truth.hidden_states[-2][0, 1:]),
            (one.cls_attention[0], truth.attentions[-2][0, :, 0, 1:].mean(0)),
        ):
            assert (value.float() - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()


def test_pixels_normalised_on_the_device_have_the_bits_of_those_normalised_on_the_cpu():
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    noise = np.random.default_rng(0).integers(0, 256, (336, 448, 3), dtype=np.uint8)
    on_device = normalise_batch([values, noise], CLIP_MEAN, CLIP_STD, device="cuda")
    for one, pixels in zip(on_device, (values, noise), strict=True):
        assert torch.equal(one.cpu(), normalise(pixels, CLIP_MEAN, CLIP_STD))


def test_a_batch_larger_than_the_memory_is_encoded_in_smaller_chunks():
    tower, pixels = make_tower(), make_pixels()
    expected = FrozenEncoder(tower, max_tokens=600).encode(pixels)
    torch.cuda.empty_cache()
    clip = FrozenEncoder(tower, max_tokens=10**9)
    needed = bytes_per_token(tower) * sum(1 + height * width // 196 for height, width in SIZES)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + needed / 3) / total)
    try:
        got = clip.encode(pixels)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert clip.max_tokens < 10**9
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.features, other.features, rtol=1e-3, atol=1e-3)


def test_the_memory_bound_holds():
    tower = make_tower().bfloat16()
    pixels = [one.bfloat16() for one in make_pixels()]
    clip = FrozenEncoder(tower, max_tokens=10**9)
    clip.encode(pixels)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    clip.encode(pixels)
    num_tokens = sum(1 + height * width // 196 for height, width in SIZES)
    assert torch.cuda.max_memory_allocated() - before <= bytes_per_token(tower) * num_tokens
