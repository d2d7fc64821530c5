"""A finished model holds any supported vision tower, through saving and loading."""

import json

import pytest
import torch
from eager_towers import TINY, eager
from transformers import AutoConfig, AutoModelForImageTextToText

from meteor.model import MeteorConfig, MeteorForConditionalGeneration
from meteor.model.image_processing import pack_pixels

TEXT = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def make_finished(name, importance):
    config_class, shape = TINY[name]
    identity = {
        "encoder_digest": "0" * 64,
        "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3},
        "importance": importance,
    }
    config = MeteorConfig(
        text_config=TEXT,
        vision_config=config_class(**shape).to_dict(),
        projector={"name": "meteor", "k": 4},
        cache_identity=identity,
    )
    torch.manual_seed(0)
    return MeteorForConditionalGeneration(config)


@pytest.mark.parametrize("name", TINY)
def test_a_saved_model_has_its_tower_and_encodes_as_the_tower_does(name, tmp_path):
    model = make_finished(name, "attention_received").eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vision_config"]["model_type"] == TINY[name][0].model_type
    assert isinstance(AutoConfig.from_pretrained(tmp_path).vision_config, TINY[name][0])
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    side = loaded.config.vision_config.patch_size
    pixels = [torch.randn(3, 2 * side, 3 * side)]
    features_SPC, attention_SP, grids_S2 = loaded.encode(pack_pixels(pixels, side), torch.tensor([[2, 3]]))
    (truth,) = eager(model.vision_tower, pixels)
    torch.testing.assert_close(features_SPC[0], truth.hidden[-2])
    torch.testing.assert_close(attention_SP[0], truth.row("attention_received", 2))
    assert grids_S2.tolist() == [[2, 3]]
