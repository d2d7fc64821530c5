"""Encoders loaded from folders as transformers saves them: the tower alone or with a text tower, with an image processor."""

import json

import pytest
import torch
from eager_towers import TINY, eager, make_model, make_tiny
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2ForImageClassification,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from meteor.errors import SettingsError
from meteor.vision.checkpoint import Preprocessing, read_preprocessing, read_vision_config
from meteor.vision.encoder import FrozenEncoder

HALF = [0.5, 0.5, 0.5]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BOTH = {
    "clip": (CLIPModel, CLIPConfig),
    "siglip": (SiglipModel, SiglipConfig),
    "siglip2_naflex": (Siglip2Model, Siglip2Config),
}


def write_processor(folder, *, inside=None, **changes):
    content = {"image_mean": HALF, "image_std": HALF, "resample": 2, **changes}
    name = "processor_config.json" if inside else "preprocessor_config.json"
    (folder / name).write_text(json.dumps({inside: content} if inside else content))


@pytest.mark.parametrize("name", BOTH)
def test_a_two_tower_model_and_its_vision_tower_alone_are_one_encoder(name, tmp_path):
    model_class, config_class = BOTH[name]
    torch.manual_seed(0)
    model = model_class(config_class(vision_config=TINY[name][1], text_config=TEXT)).eval()
    model.save_pretrained(tmp_path / "both")
    model.vision_model.save_pretrained(tmp_path / "alone")
    write_processor(tmp_path / "both", inside="image_processor")
    write_processor(tmp_path / "alone")
    both, alone = (FrozenEncoder.from_pretrained(str(tmp_path / part)) for part in ("both", "alone"))
    assert both.weights_digest == alone.weights_digest
    assert (both.mean, both.std) == (alone.mean, alone.std) == (tuple(HALF), tuple(HALF))
    assert both.importance == ("class_token" if name == "clip" else "pooling_query")
    side = model.config.vision_config.patch_size
    pixels = [torch.randn(3, 2 * side, 3 * side)]
    (truth,) = eager(model.vision_model, pixels)
    for encoder in (both, alone):
        torch.testing.assert_close(encoder.encode(pixels)[0].features, truth.hidden[-2])


@pytest.mark.parametrize("name", ["dinov2", "dinov2_gated", "dinov2_registers", "dinov3", "dinov3_gated"])
def test_a_saved_tower_is_the_tower(name, tmp_path):
    model = make_tiny(name)
    model.save_pretrained(tmp_path)
    write_processor(tmp_path, **IMAGENET)
    encoder = FrozenEncoder.from_pretrained(str(tmp_path))
    pixels = [torch.randn(3, 2 * encoder.patch_size, 3 * encoder.patch_size)]
    (got,), (truth,) = encoder.encode(pixels), eager(model, pixels)
    torch.testing.assert_close(got.features, truth.hidden[-2])
    torch.testing.assert_close(got.cls_attention[0], truth.row("class_token", 2))
    assert encoder.mean == tuple(IMAGENET["image_mean"])


def test_a_dino_with_a_classifier_is_its_tower(tmp_path):
    config_class, shape = TINY["dinov2"]
    model = Dinov2ForImageClassification(config_class(**shape)).eval()
    model.save_pretrained(tmp_path)
    write_processor(tmp_path, **IMAGENET)
    pixels = [torch.randn(3, 28, 42)]
    (got,), (truth,) = FrozenEncoder.from_pretrained(str(tmp_path)).encode(pixels), eager(model.dinov2, pixels)
    torch.testing.assert_close(got.features, truth.hidden[-2])


def test_rotations_keep_their_precision_when_the_tower_is_cast(tmp_path):
    # transformers makes the frequencies in float32 whatever the dtype of the weights.
    model = make_tiny("dinov3", spread=0.02)
    model.save_pretrained(tmp_path)
    write_processor(tmp_path)
    cast = FrozenEncoder.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.rope_embeddings.inv_freq.dtype == torch.float32
    expected = loaded.rope_embeddings(torch.zeros(1, 3, 48, 80, dtype=torch.bfloat16))
    rotary = cast._tower.position((3, 5)).rotary
    assert all(torch.equal(got, truth) for got, truth in zip(rotary, expected, strict=True))


@pytest.mark.parametrize(
    ("processor", "name", "resample"),
    [(SiglipImageProcessorPil, "siglip", "bicubic"), (Siglip2ImageProcessorPil, "siglip2_naflex", "bilinear")],
)
def test_the_files_of_transformers_own_processors_are_read(processor, name, resample, tmp_path):
    processor().save_pretrained(tmp_path)
    config = TINY[name][0](**TINY[name][1])
    assert read_preprocessing(str(tmp_path), config) == Preprocessing(HALF, HALF, resample)


@pytest.mark.parametrize("missing", ["image_mean", "image_std", "resample"])
def test_defaults_of_clip_are_not_those_of_other_towers(missing, tmp_path):
    write_processor(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    content = json.loads(file.read_text())
    del content[missing]
    file.write_text(json.dumps(content))
    read_preprocessing(str(tmp_path), make_tiny("clip").config)
    with pytest.raises(SettingsError, match=f"{missing} is None"):
        read_preprocessing(str(tmp_path), make_tiny("dinov2").config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vit"}, r"type 'vit'.*Supported are CLIP.*SigLIP.*NaFlex.*DINOv2.*DINOv3"),
        ({"model_type": "dinov3_convnext"}, "type 'dinov3_convnext'"),
        ({"model_type": "siglip_text_model"}, "type 'siglip_text_model'"),
        ({"model_type": "dinov2", "patch_size": [14, 16]}, "patches must be squares"),
    ],
)
def test_other_checkpoints_are_refused_before_their_weights_are_read(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=message):
        read_vision_config(str(tmp_path))


def test_a_checkpoint_without_the_head_that_its_configuration_names_is_refused(tmp_path):
    config_class, shape = TINY["siglip"]
    make_model(config_class(**shape, vision_use_head=False)).save_pretrained(tmp_path)
    write_processor(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "vision_use_head": True}))
    with pytest.raises(SettingsError, match=r"lacks \d+ weights"):
        FrozenEncoder.from_pretrained(str(tmp_path))
