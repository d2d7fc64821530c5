"""The tiny models load like the real ones; with full training the tower looks at the things in an image."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPModel, CLIPVisionModel

from meteor.constants import CLIP_MEAN, CLIP_STD
from meteor.errors import AlreadyExistsError, SettingsError
from meteor.synthetic.models import TinyModels, held_out_attention, make_tiny_models
from meteor.vision.encoder import FrozenEncoder


def ignore(line: str) -> None:
    pass


def test_the_vision_tower_encodes_sub_images_of_any_grid(tiny_models: TinyModels) -> None:
    encoder = FrozenEncoder.from_pretrained(str(tiny_models.clip))
    sizes = [(112, 112), (84, 140), (168, 56)]
    encoded = encoder.encode([torch.zeros(3, height, width) for height, width in sizes])
    assert [seen.grid for seen in encoded] == [(8, 8), (6, 10), (12, 4)]
    assert [tuple(seen.features.shape) for seen in encoded] == [(64, 64), (60, 64), (48, 64)]
    assert tuple(encoder.mean) == CLIP_MEAN
    assert tuple(encoder.std) == CLIP_STD


def test_the_clip_directory_is_a_whole_clip_with_its_captions_tokenizer(tiny_models: TinyModels) -> None:
    clip = CLIPModel.from_pretrained(tiny_models.clip)
    vision = CLIPVisionModel.from_pretrained(tiny_models.clip, config=clip.config.vision_config)
    assert vision.config.patch_size == 14
    words = AutoTokenizer.from_pretrained(tiny_models.clip)("a red star on the left", return_tensors="pt")
    assert clip.text_model(**words).pooler_output.shape == (1, 64)


def test_the_llm_directory_holds_weights_and_vicunas_tokenizer_files(tiny_models: TinyModels) -> None:
    llm = AutoModelForCausalLM.from_pretrained(tiny_models.llm)
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.llm)
    ids = tokenizer("USER: What colour is the star? ASSISTANT:", return_tensors="pt").input_ids
    assert llm.get_input_embeddings().num_embeddings == len(tokenizer)
    assert llm(input_ids=ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    assert llm.config.model_type == "llama"
    assert (tiny_models.llm / "tokenizer.model").is_file()


def test_the_record_says_how_the_tower_does(tiny_models: TinyModels) -> None:
    record = json.loads(tiny_models.record.read_text())
    assert record["arguments"]["train_steps"] == 2
    assert record["clip"]["retrieval_chance"] == 1 / 64
    assert 0 < record["clip"]["attention_chance"] < 0.5
    assert record["clip"]["final_loss"] > 3
    assert record["llm"]["final_loss"] > 3


def test_an_untrained_tower_looks_nowhere_in_particular(tiny_models: TinyModels) -> None:
    assert 0.85 < held_out_attention(tiny_models.clip, seed=1).ratio < 1.15


def test_a_second_call_finds_the_models_and_other_arguments_are_refused(tiny_models: TinyModels) -> None:
    before = tiny_models.record.stat().st_mtime_ns
    assert make_tiny_models(tiny_models.folder, train_steps=2, num_threads=1, report=ignore) == tiny_models
    assert tiny_models.record.stat().st_mtime_ns == before
    with pytest.raises(AlreadyExistsError, match="'train_steps': 2"):
        make_tiny_models(tiny_models.folder, train_steps=3, num_threads=1, report=ignore)


def test_negative_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="train_steps=-1"):
        make_tiny_models(tmp_path, train_steps=-1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_trained_tower_looks_at_the_things_and_finds_captions(tmp_path: Path, seed: int) -> None:
    models = make_tiny_models(tmp_path / "trained", seed=seed, report=ignore)
    blind = make_tiny_models(tmp_path / "blind", seed=seed, train_steps=0, report=ignore)
    assert held_out_attention(models.clip, seed=100).ratio > 1.5
    assert held_out_attention(blind.clip, seed=100).ratio < 1.15
    record = json.loads(models.record.read_text())
    assert record["clip"]["retrieval_accuracy"] > 10 * record["clip"]["retrieval_chance"]
