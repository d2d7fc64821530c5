"""Vision towers with random weights that take so long that something can happen meanwhile."""

import shutil
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel


def write_clip(folder: Path, small: Path, *, width: int, num_layers: int) -> str:
    """Write a tower for images of 56 pixels, with the pixels' normalisation of the tiny one; return its path."""
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    config = CLIPVisionConfig(**shape, num_hidden_layers=num_layers, image_size=56, patch_size=14)
    CLIPVisionModel(config).save_pretrained(folder)
    shutil.copy(small / "models/clip/preprocessor_config.json", folder)
    return str(folder)
