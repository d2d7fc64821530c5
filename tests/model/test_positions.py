"""Positions of language models, against the lengths that their makers publish."""

import pytest
from transformers import AutoConfig

from meteor.model.positions import num_positions


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("llama", {"max_position_embeddings": 4096}, 4096),
        # Vicuna 1.5 16K.
        ("llama", {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        # Llama 3.1: the number after scaling is in the configuration.
        (
            "llama",
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        # Qwen2.5 as its card extends it, and DeepSeek V3.
        (
            "qwen2",
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            "llama",
            {
                "max_position_embeddings": 163840,
                "rope_scaling": {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
            },
            163840,
        ),
        ("gemma3_text", {"max_position_embeddings": 131072}, 131072),
        ("gpt2", {}, 1024),
        ("mamba", {}, None),
    ],
)
def test_the_limit_is_the_published_one(name, settings, expected):
    assert num_positions(AutoConfig.for_model(name, **settings)) == expected
