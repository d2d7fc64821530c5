import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from meteor.errors import SettingsError
from meteor.vision.checkpoint import Preprocessing, read_preprocessing
from meteor.vision.digest import weights_digest
from meteor.vision.encoder import FrozenEncoder


def make_tower(num_layers: int = 4, seed: int = 0) -> CLIPVisionModel:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    return CLIPVisionModel(config).eval()


def make_pixels(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, h, w, generator=generator) for h, w in sizes]


@pytest.mark.parametrize("layer", [-2, -1, 2])
def test_features_and_attention_equal_the_eager_tower_with_all_its_maps(layer):
    tower = make_tower()
    (pixels,) = make_pixels((42, 70))
    eager = make_tower()
    eager.load_state_dict(tower.state_dict())
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        truth = eager(pixels[None], interpolate_pos_encoding=True, output_hidden_states=True, output_attentions=True)
    (got,) = FrozenEncoder(tower, select_layer=layer, attention_layers=(layer,)).encode([pixels])
    block = (layer if layer > 0 else 5 + layer) - 1
    torch.testing.assert_close(got.features, truth.hidden_states[layer][0, 1:])
    torch.testing.assert_close(got.cls, truth.hidden_states[layer][0, 0])
    torch.testing.assert_close(got.cls_attention[0], truth.attentions[block][0, :, 0, 1:].mean(0))
    assert got.grid == (3, 5)


def test_a_batch_of_mixed_grids_gives_what_each_gives_alone_in_the_order_given():
    clip = FrozenEncoder(make_tower())
    pixels = make_pixels((56, 56), (28, 84), (56, 56), (84, 28), (28, 84))
    together = clip.encode(pixels)
    for one, alone in zip(together, (clip.encode([p])[0] for p in pixels), strict=True):
        assert one.grid == alone.grid
        torch.testing.assert_close(one.features, alone.features)
        torch.testing.assert_close(one.cls_attention, alone.cls_attention)


def test_several_attention_layers_come_in_the_order_asked_for():
    (pixels,) = make_pixels((56, 56))
    tower = make_tower()
    (both,) = FrozenEncoder(tower, attention_layers=(-1, 2)).encode([pixels])
    for row, layer in enumerate((-1, 2)):
        (one,) = FrozenEncoder(tower, attention_layers=(layer,)).encode([pixels])
        torch.testing.assert_close(both.cls_attention[row], one.cls_attention[0])


def test_blocks_after_the_last_needed_one_are_not_run():
    tower = make_tower()
    (pixels,) = make_pixels((56, 56))
    expected = FrozenEncoder(tower).encode([pixels])[0].features
    for parameter in tower.encoder.layers[3].parameters():
        parameter.fill_(float("nan"))
    torch.testing.assert_close(FrozenEncoder(tower).encode([pixels])[0].features, expected)


def test_bin_and_safetensors_full_clip_and_tower_have_one_digest(tmp_path):
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    model = CLIPModel(CLIPConfig(vision_config={**vision, "image_size": 56, "patch_size": 14}, text_config=text))
    model.save_pretrained(tmp_path / "full")
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    model.vision_model.save_pretrained(tmp_path / "tower")
    for name in ("full", "bin", "tower"):
        (tmp_path / name / "preprocessor_config.json").write_text("{}")
    digests = {FrozenEncoder.from_pretrained(str(tmp_path / name)).weights_digest for name in ("full", "bin", "tower")}
    assert digests == {weights_digest(model.vision_model.state_dict())}
    half = FrozenEncoder.from_pretrained(str(tmp_path / "full"), dtype=torch.bfloat16)
    assert half.weights_digest in digests


HALF = {"image_mean": [0.5, 0.25, 0.5], "image_std": [0.25, 0.5, 0.25]}


@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config.json": HALF},
        {"processor_config.json": {"processor_class": "CLIPProcessor", "image_processor": HALF}},
        {
            "preprocessor_config.json": {
                **HALF,
                "do_normalize": True,
                "do_rescale": True,
                "rescale_factor": 0.00392156862745098,
            }
        },
        {"preprocessor_config.json": HALF, "processor_config.json": {"image_processor": {"image_mean": [0, 0, 0]}}},
    ],
)
def test_the_normalisation_is_the_checkpoints_own(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    # The processor of CLIP resizes with its bicubic filter if its file names none.
    expected = Preprocessing(HALF["image_mean"], HALF["image_std"], "bicubic")
    assert read_preprocessing(str(tmp_path), CLIPVisionConfig()) == expected


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"do_normalize": False}, "do_normalize is False"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
        ({"rescale_factor": None}, "rescale_factor is None"),
        ({"image_mean": None}, "image_mean is None, not three numbers"),
        ({"image_std": [0.5]}, "image_std is"),
        ({"image_std": [0.5, "0.5", 0.5]}, "image_std is"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean is"),
        ({"resample": 0}, r"resample is 0, not 1 \(lanczos\)"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
    ],
)
def test_pixels_that_the_checkpoint_wants_otherwise_are_refused(tmp_path, change, problem):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**HALF, **change}))
    with pytest.raises(SettingsError, match=problem):
        read_preprocessing(str(tmp_path), CLIPVisionConfig())


@pytest.mark.parametrize("text", [None, "", "[1]", "{"])
def test_a_checkpoint_without_its_normalisation_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "processor_config.json").write_text(text)
    with pytest.raises(SettingsError, match=r"processor_config\.json"):
        read_preprocessing(str(tmp_path), CLIPVisionConfig())


def test_the_digest_depends_on_values_names_and_types():
    base = {"a": torch.zeros(2), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(2), "b": torch.full((2,), 1.5)},
        {"a": torch.zeros(2), "c": torch.ones(2)},
        {"a": torch.zeros(2), "b": torch.ones(2, dtype=torch.float64)},
        {"a": torch.zeros(2), "b": torch.ones(1, 2)},
    ]
    assert len({weights_digest(tensors) for tensors in [base, *others]}) == 5


def test_missing_and_wrong_checkpoints_say_so(tmp_path):
    with pytest.raises(SettingsError, match=r"vision\.path"):
        FrozenEncoder.from_pretrained(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SettingsError, match="CLIP"):
        FrozenEncoder.from_pretrained(str(tmp_path))
    with pytest.raises(SettingsError, match="layer 7"):
        FrozenEncoder(make_tower(), select_layer=7)
