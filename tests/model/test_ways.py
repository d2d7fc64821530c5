"""Choice of attention and batching, and the message when the settings ask for something that does not work."""

import pytest
import torch
from transformers import AutoConfig

from meteor.errors import SettingsError
from meteor.model.trial import find_ways
from meteor.model.ways import choose_way

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about absent kernels


def choose(name, *, attention="auto", batching="auto", device=CPU, dtype=torch.float32):
    ways = find_ways(AutoConfig.for_model(name))
    return choose_way(ways, attention=attention, batching=batching, device=device, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "attention", "batching"),
    [
        ("llama", CPU, torch.float32, "varlen", "packed"),
        ("llama", CUDA, torch.bfloat16, "varlen", "packed"),
        ("llama", CUDA, torch.float32, "sdpa", "packed"),
        ("stablelm", CUDA, torch.bfloat16, "sdpa", "packed"),
        ("gpt_oss", CUDA, torch.bfloat16, "eager", "packed"),
        ("qwen3_next", CUDA, torch.bfloat16, "sdpa", "grouped"),
        ("mamba", CUDA, torch.bfloat16, "eager", "grouped"),
    ],
)
def test_auto_takes_the_fastest_that_works(name, device, dtype, attention, batching):
    way = choose(name, device=device, dtype=dtype)
    assert (way.attention, way.batching) == (attention, batching)


def test_the_line_of_the_log_says_why_samples_have_a_row_each():
    assert "tokens by more than attention" in choose("mamba").text
    assert choose("llama").text == "LlamaForCausalLM: several samples per row (packed), attention varlen"
    assert (
        choose("llama", batching="grouped").text == "LlamaForCausalLM: one sample per row (grouped), attention varlen"
    )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "mamba",
            {"batching": "packed"},
            "batching=packed does not work with MambaForCausalLM: a neighbour in the row",
        ),
        ("gemma2", {"attention": "varlen"}, "llm.attention=varlen .* Gemma2ForCausalLM: a sample in a row with others"),
        ("gpt_oss", {"attention": "sdpa"}, "GptOssForCausalLM does not support attention 'sdpa'"),
        ("falcon", {"attention": "sdpa"}, "FalconForCausalLM computes its attention itself"),
        ("stablelm", {"attention": "varlen"}, "StableLmAttention may not: take 'sdpa'"),
        ("mamba", {"attention": "varlen", "batching": "grouped"}, "llm.attention=varlen with batching=grouped"),
        ("bert", {}, "BertLMHeadModel cannot be trained: a later token changes"),
        ("gemma4_text", {}, "cannot be trained: it takes words but no embeddings"),
    ],
)
def test_a_wish_that_does_not_work_is_refused_with_the_reason(name, settings, message):
    with pytest.raises(SettingsError, match=message):
        choose(name, **settings)


def test_varlen_in_float32_on_cuda_is_refused():
    with pytest.raises(SettingsError, match="needs bfloat16 or float16 on CUDA"):
        choose("llama", attention="varlen", device=CUDA)


def test_an_architecture_that_cannot_be_shrunk_is_left_to_the_workers():
    way = choose("zamba2")
    assert (way.attention, way.batching) == ("sdpa", "grouped")
    assert "a tiny model of it cannot be tried" in way.text
    assert choose("zamba2", batching="packed").batching == "packed"
