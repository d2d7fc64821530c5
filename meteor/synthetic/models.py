"""Tiny CLIP that attends to objects and tiny Llama, in the file formats of the real models."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from meteor.constants import CLIP_MEAN, CLIP_STD
from meteor.errors import SettingsError
from meteor.synthetic.attention import BoxAttention, attention_in_scenes
from meteor.synthetic.contrastive import HELD_OUT_PER_GRID, IMAGE_SIZE, train_clip
from meteor.synthetic.language import train_language
from meteor.synthetic.publish import publish_folder
from meteor.synthetic.scenes import SceneDealer
from meteor.synthetic.streams import random_stream
from meteor.synthetic.tokenizer import MAX_LENGTH, make_tokenizer
from meteor.vision.encoder import FrozenEncoder

MODELS_VERSION = 3
TRAIN_STEPS = 360
MAX_LANGUAGE_STEPS = 200
_RECORD = "models.json"
_NUM_ATTENTION_SCENES = 60
_LLM_WIDTH = 128
_LLM_FEED_FORWARD_WIDTH = 384
_NUM_LLM_LAYERS = 4
_NUM_LLM_HEADS = 4
# transformers' default of 0.02 suits widths of thousands. At width 128 an overfit set of 64 images took twice as many steps
# with it.
_LLM_INITIAL_STD = 0.05


@dataclass(frozen=True)
class TinyModels:
    """Paths of the generated models."""

    folder: Path

    @property
    def clip(self) -> Path:
        """Hugging Face directory of a ``CLIPModel`` (112 pixels, patch size 14, width 64) and its preprocessor."""
        return self.folder / "clip"

    @property
    def llm(self) -> Path:
        """Hugging Face directory of a ``LlamaForCausalLM`` trained on generated texts, with tokenizer files like Vicuna's."""
        return self.folder / "llm"

    @property
    def record(self) -> Path:
        """JSON file with the arguments and CLIP's final loss, retrieval accuracy and attention inside boxes."""
        return self.folder / _RECORD


def make_tiny_models(
    folder: str | Path,
    *,
    seed: int = 0,
    train_steps: int = TRAIN_STEPS,
    num_threads: int = 1,
    report: Callable[[str], None] = print,
) -> TinyModels:
    """Make the models, unless the folder holds models with equal arguments already.

    Args:
        folder: written folder, which appears complete or not at all.
        seed: seed of weights, images and order.
        train_steps: number of CLIP's training steps, about 0.1 s each. Llama takes an equal number, but at most
            `MAX_LANGUAGE_STEPS`. A few steps are enough if only shapes and formats matter; with 0 the weights stay random.
        num_threads: number of torch's threads. Results are equal bit for bit for equal numbers. Two threads save a quarter
            of the time on two idle cores, but cost a multiple if another process needs one of the cores.
        report: callback for lines of progress.

    Raises:
        SettingsError: an argument is below its minimum.
        AlreadyExistsError: the folder holds something else.
    """
    if train_steps < 0 or num_threads < 1:
        raise SettingsError(f"train_steps={train_steps} must be 0 or more and num_threads={num_threads} 1 or more.")
    models = TinyModels(Path(folder))
    arguments = {
        "seed": seed,
        "train_steps": train_steps,
        "num_threads": num_threads,
        "models_version": MODELS_VERSION,
    }

    def fill(temporary: Path) -> dict[str, Any]:
        with _threads(num_threads):
            return _fill(TinyModels(temporary), seed, train_steps, report)

    publish_folder(models.folder, _RECORD, arguments, fill)
    return models


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fill(models: TinyModels, seed: int, train_steps: int, report: Callable[[str], None]) -> dict[str, Any]:
    started = time.monotonic()
    trained = train_clip(seed=seed, num_steps=train_steps, report=report)
    trained.model.save_pretrained(models.clip)
    trained.tokenizer.save_pretrained(models.clip)
    (models.clip / "preprocessor_config.json").write_text(json.dumps(_preprocessor(), indent=2) + "\n")
    attention = held_out_attention(models.clip, seed)
    report(
        f"tiny CLIP: finds {trained.retrieval_accuracy:.0%} of held-out captions (chance {1 / HELD_OUT_PER_GRID:.1%}), "
        f"{attention.share:.0%} of its attention lies inside boxes ({attention.ratio:.2f} times chance)"
    )
    language_loss = _make_llm(models.llm, seed, min(train_steps, MAX_LANGUAGE_STEPS), report)
    return {
        "clip": {
            "final_loss": trained.final_loss,
            "retrieval_accuracy": trained.retrieval_accuracy,
            "retrieval_chance": 1 / HELD_OUT_PER_GRID,
            "attention_in_boxes": attention.share,
            "attention_chance": attention.chance,
        },
        "llm": {"final_loss": language_loss},
        "seconds": round(time.monotonic() - started, 1),
    }


def held_out_attention(clip: Path, seed: int) -> BoxAttention:
    """Measure the saved tower's attention in sliced scenes of all sizes that training with ``seed`` has not seen."""
    scenes = list(islice(SceneDealer(random_stream(seed, "attention scenes")), _NUM_ATTENTION_SCENES))
    return attention_in_scenes(FrozenEncoder.from_pretrained(str(clip)), scenes, resolution=IMAGE_SIZE)


def _preprocessor() -> dict[str, Any]:
    """Return the preprocessor settings of openai/clip-vit-large-patch14-336 with this tower's resolution."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }


def _make_llm(folder: Path, seed: int, num_steps: int, report: Callable[[str], None]) -> float | None:
    """Write the language model and its tokenizer; return the final loss in nats per token."""
    folder.mkdir()
    make_tokenizer(folder, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_LLM_WIDTH,
        intermediate_size=_LLM_FEED_FORWARD_WIDTH,
        num_hidden_layers=_NUM_LLM_LAYERS,
        num_attention_heads=_NUM_LLM_HEADS,
        num_key_value_heads=_NUM_LLM_HEADS,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        initializer_range=_LLM_INITIAL_STD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    final_loss = train_language(model, tokenizer, seed=seed, num_steps=num_steps, report=report)
    model.save_pretrained(folder)
    return final_loss
