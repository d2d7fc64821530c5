"""All stages with language models that are not built like Llama: the start chooses layout and attention, and answers come."""

import json
import logging
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from meteor.assembly import Inputs
from meteor.errors import SettingsError
from meteor.model.tiny import tiny_config
from pipelines import evaluate, finetune, pretrain

pytestmark = [pytest.mark.usefixtures("ray_once"), pytest.mark.filterwarnings("ignore")]
SETTINGS = {"granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16}}


@pytest.fixture
def make_llm(small, tmp_path):
    def make(name):
        """A tiny model of an architecture, with the tokenizer of the small run."""
        tokenizer = AutoTokenizer.from_pretrained(small / "models/llm")
        config = tiny_config(AutoConfig.for_model(name, **SETTINGS.get(name, {})))
        config.vocab_size, config.max_position_embeddings = len(tokenizer), 1024
        for token in ("bos", "eos", "pad"):
            setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
        folder = tmp_path / name
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gemma2", "Gemma2ForCausalLM: several samples per row (packed), attention eager"),
        ("granitemoehybrid", "GraniteMoeHybridForCausalLM: one sample per row (grouped), attention sdpa, because"),
    ],
)
def test_all_stages_run_with_another_language_model(name, line, make_llm, make_settings, encode, caplog):
    selection = {"visual_weight": 0.3, "sets": {"scenes": {"k": 2}}}
    settings = make_settings(llm={"path": make_llm(name)}, evaluate=selection)
    encode(settings)
    with caplog.at_level(logging.INFO):
        stages = [stage.run(Inputs(settings)) for stage in (pretrain, finetune, evaluate)]
    assert sum(line in record.getMessage() for record in caplog.records) == 2
    scores = json.loads(Path(stages[-1].results["run"], "scores.json").read_text())
    assert scores["scenes"]["num_questions"] == 8


def test_a_length_above_the_model_s_positions_is_refused(make_settings, encode):
    settings = make_settings(pretrain={"max_length": 100_000})
    encode(settings)
    with pytest.raises(SettingsError, match=r"pretrain.max_length=100000, but the language model .* has \d+ positions"):
        pretrain.run(Inputs(settings))
