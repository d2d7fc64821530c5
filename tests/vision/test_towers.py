"""Every supported tower in one packed pass against transformers' own eager tower, one sub-image at a time."""

import pytest
import torch
from eager_towers import TINY, eager, flattened, make_model, make_tiny
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTModel,
)

from meteor.errors import SettingsError
from meteor.vision.encoder import FrozenEncoder
from meteor.vision.memory import bytes_per_token
from meteor.vision.towers import TowerShape, tower_of

# Patch grids: the one the positions were trained for, wider, taller, a single patch, and twice the same in a batch.
GRIDS = [(4, 4), (2, 6), (6, 2), (4, 4), (1, 1), (3, 5), (2, 6), (5, 5)]
NUM_LAYERS = 4


def make_pixels(side, grids=GRIDS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, rows * side, columns * side, generator=generator) for rows, columns in grids]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    ("select_layer", "attention_layers"), [(-2, (-2,)), (-1, (-1, 1)), (2, (3, 2))], ids=["-2", "-1", "2"]
)
def test_features_and_importance_rows_equal_the_eager_tower(name, select_layer, attention_layers):
    model = make_tiny(name)
    pixels = make_pixels(model.config.patch_size)
    encoder = FrozenEncoder(model, select_layer=select_layer, attention_layers=attention_layers, max_tokens=60)
    expected = "pooling_query" if "siglip" in name else "class_token"
    assert encoder.importance == expected
    for got, one, truth in zip(encoder.encode(pixels), pixels, eager(model, pixels), strict=True):
        assert got.grid == (one.shape[1] // encoder.patch_size, one.shape[2] // encoder.patch_size)
        assert got.finite
        torch.testing.assert_close(got.features, truth.hidden[select_layer])
        cls = truth.cls[select_layer] if truth.num_prefix else truth.hidden[select_layer].mean(0)
        torch.testing.assert_close(got.cls, cls)
        for row, layer in zip(got.cls_attention, attention_layers, strict=True):
            block = (layer if layer > 0 else NUM_LAYERS + 1 + layer) - 1
            torch.testing.assert_close(row, truth.row(expected, block))


@pytest.mark.parametrize("name", TINY)
def test_the_attention_that_patches_receive_equals_the_mean_of_the_eager_map(name):
    model = make_tiny(name)
    pixels = make_pixels(model.config.patch_size)
    encoder = FrozenEncoder(model, attention_layers=(-2, 1), importance="attention_received")
    for got, truth in zip(encoder.encode(pixels), eager(model, pixels), strict=True):
        torch.testing.assert_close(got.features, truth.hidden[-2])
        for row, block in zip(got.cls_attention, (2, 0), strict=True):
            torch.testing.assert_close(row, truth.row("attention_received", block))


@pytest.mark.parametrize("name", TINY)
def test_a_grid_in_half_precision_is_near_the_float32_grid(name):
    # The spread of weights is that of a new model: with more, the rounding of three blocks adds up.
    model = make_tiny(name, spread=0.02)
    pixels = make_pixels(model.config.patch_size, [(4, 4), (3, 5)])
    expected = FrozenEncoder(model).encode(pixels)
    for got, exact in zip(FrozenEncoder(model.to(torch.bfloat16)).encode(pixels), expected, strict=True):
        assert got.features.dtype == torch.bfloat16
        assert got.cls_attention.dtype == torch.float32
        assert (got.features.float() - exact.features).abs().max() <= 0.06 * exact.features.abs().max()


@pytest.mark.parametrize("name", ["siglip", "siglip2_naflex"])
def test_blocks_after_the_selected_layer_run_for_the_pooling_query_alone(name):
    model = make_tiny(name)
    pixels = make_pixels(model.config.patch_size, [(4, 4)])
    (before,) = FrozenEncoder(model, importance="attention_received").encode(pixels)
    (pooled,) = FrozenEncoder(model).encode(pixels)
    model.encoder.layers[3].mlp.fc1.bias.data.fill_(float("nan"))
    (after,) = FrozenEncoder(model, importance="attention_received").encode(pixels)
    assert torch.equal(after.features, before.features)
    (bad,) = FrozenEncoder(model).encode(pixels, raise_bad=False)
    assert pooled.finite
    assert not bad.finite


def test_padding_of_flattened_patches_changes_nothing_that_packing_leaves_out():
    # NaFlex's own processor pads each image to 256 patches and masks the padding.
    model = make_tiny("siglip2_naflex")
    (pixels,) = make_pixels(16, [(3, 5)])
    given = flattened(pixels, 16)
    padded = {
        "pixel_values": torch.nn.functional.pad(given["pixel_values"], (0, 0, 0, 10)),
        "pixel_attention_mask": torch.nn.functional.pad(given["pixel_attention_mask"], (0, 10)),
        "spatial_shapes": given["spatial_shapes"],
    }
    with torch.no_grad():
        truth = model(**padded, output_hidden_states=True).hidden_states[-2][0, :15]
    (got,) = FrozenEncoder(model).encode([pixels])
    torch.testing.assert_close(got.features, truth)


@pytest.mark.parametrize(
    ("name", "importance", "message"),
    [
        (
            "siglip",
            "class_token",
            "siglip_vision_model encoder has no class token; set vision.importance to pooling_query",
        ),
        ("dinov3", "pooling_query", "dinov3_vit encoder has no pooling head; set vision.importance to class_token"),
        ("clip", "pooling_query", "clip_vision_model encoder has no pooling head"),
    ],
)
def test_an_importance_row_that_a_tower_lacks_is_refused(name, importance, message):
    with pytest.raises(SettingsError, match=message):
        FrozenEncoder(make_tiny(name), importance=importance)


def test_a_siglip_without_its_head_needs_another_importance_row():
    config_class, shape = TINY["siglip"]
    model = make_model(config_class(**shape, vision_use_head=False))
    with pytest.raises(SettingsError, match=r"set vision\.importance to attention_received"):
        FrozenEncoder(model)
    assert FrozenEncoder(model, importance="attention_received").encode(make_pixels(16, [(2, 2)]))[0].finite


def test_other_models_are_refused_with_the_names_of_those_that_are_supported():
    model = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(SettingsError, match=r"type 'vit', which is no supported.*siglip2.*dinov2.*dinov3_vit"):
        FrozenEncoder(model)


@pytest.mark.parametrize(
    ("name", "mlp_width", "resolution", "grid_side"),
    [
        ("clip", 64, 56, 4),
        ("siglip", 64, 64, 4),
        ("siglip_odd", 64, 60, 4),
        ("siglip2_naflex", 64, 64, 4),
        ("dinov2", 64, 70, 5),
        ("dinov2_gated", 88, 70, 5),  # two thirds of 128, rounded up to a multiple of 8
        ("dinov3_gated", 64, 64, 4),
    ],
)
def test_the_shape_of_a_tower_follows_from_its_configuration(name, mlp_width, resolution, grid_side):
    shape = TowerShape.of(TINY[name][0](**TINY[name][1]))
    assert (shape.width, shape.num_blocks, shape.mlp_width) == (32, 4, mlp_width)
    assert (shape.resolution, shape.grid_side) == (resolution, grid_side)
    assert shape.gated_mlp == name.endswith("gated")


@pytest.mark.parametrize("name", TINY)
def test_the_tokens_before_the_patches_follow_from_the_configuration(name):
    model = make_tiny(name)
    assert TowerShape.of(model.config).num_prefix == tower_of(model).num_prefix


def test_the_memory_of_a_token_counts_the_gate():
    plain, gated = (make_tiny(name).to(torch.bfloat16) for name in ("dinov3", "dinov3_gated"))
    for model in (plain, gated):
        model.config.hidden_size, model.config.intermediate_size = 4096, 8192
    assert bytes_per_token(plain) == 2 * (8 * 4096 + 2 * 4096)  # attention's step is the larger one
    assert bytes_per_token(gated) == 2 * (5 * 4096 + 3 * 8192)


REAL = {
    "clip-vit-large-patch14-336": CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ),
    "siglip-so400m-patch14-384": SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    ),
    "siglip2-base-patch16-256": SiglipVisionConfig(image_size=256),
    "siglip2-base-patch16-naflex": Siglip2VisionConfig(),
    "dinov2-large": Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518),
    "dinov2-with-registers-base": Dinov2WithRegistersConfig(image_size=518),
    "dinov3-vitb16": DINOv3ViTConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_register_tokens=4
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_shapes_equal_the_eager_tower(name):
    model = make_model(REAL[name], spread=0.01)
    side, shape = model.config.patch_size, TowerShape.of(model.config)
    # DINOv2's own 37 x 37 patches would need gigabytes for eager maps.
    pixels = make_pixels(side, [(min(shape.grid_side, 27),) * 2, (7, 20)])
    truths = eager(model, pixels)
    default = "pooling_query" if "siglip" in name else "class_token"
    for importance in (default, "attention_received") if shape.num_blocks == 12 else (default,):
        encoder = FrozenEncoder(model, importance=importance)
        for got, truth in zip(encoder.encode(pixels), truths, strict=True):
            scale = truth.hidden[-2].abs().max()
            torch.testing.assert_close(got.features, truth.hidden[-2], rtol=0, atol=1e-5 * scale.item())
            row = truth.row(importance, shape.num_blocks - 2)
            torch.testing.assert_close(got.cls_attention[0], row, rtol=1e-3, atol=1e-5 * row.max().item())
