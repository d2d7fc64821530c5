"""The tiny Llama reads dialogues and captions as the stages will write them, and learns from them."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from meteor.synthetic.language import language_samples, train_language
from meteor.synthetic.models import TinyModels


@pytest.fixture(scope="module")
def tokenizer(tiny_models: TinyModels) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_models.llm)


def make_llama(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **size))


def test_samples_are_dialogues_and_captions_without_placeholders(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = language_samples(tokenizer, seed=0)
    assert all(0 <= piece < len(tokenizer) for sample in samples for piece in sample.input_ids)
    texts = [tokenizer.decode(sample.input_ids, skip_special_tokens=True) for sample in samples]
    assert any("USER: How many shapes" in text for text in texts)
    assert any(text.startswith(("a ", "an ")) for text in texts)


def test_a_few_steps_lower_the_loss_and_none_leave_the_weights(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_llama(tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert train_language(model, tokenizer, seed=0, num_steps=0, report=print) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    lines: list[str] = []
    loss = train_language(model, tokenizer, seed=0, num_steps=25, report=lines.append)
    assert loss is not None
    assert loss < 5.5
    assert lines[-1].startswith("tiny Llama: step 25/25, loss ")
