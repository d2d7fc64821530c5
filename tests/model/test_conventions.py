"""A finished model in other people's hands: transformers' pipeline, loading without this library's import, PEFT, TRL."""

import base64
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

from meteor.constants import IGNORE_INDEX
from meteor.errors import TooLongError
from meteor.model import MeteorForConditionalGeneration, MeteorProcessor
from meteor.text.conversation import Conversation, Turn
from meteor.text.tokens import tokenise

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model(finished_model):
    return MeteorForConditionalGeneration.from_pretrained(finished_model).eval()


@pytest.fixture(scope="module")
def processor(finished_model):
    return MeteorProcessor.from_pretrained(finished_model)


@pytest.fixture
def answer_of(model, processor, ask):
    """The answer found without any of transformers' helpers."""

    def answer(words, images=()):
        inputs = ask(processor, words, images)
        return model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]

    return answer


def test_the_pipeline_answers_messages_with_images_of_every_kind(
    finished_model, make_image, answer_of, processor, tmp_path
):
    wide, square = make_image(112, 56), make_image(56, 56, seed=1)
    wide.save(tmp_path / "wide.png")
    pipe = pipeline("image-text-to-text", model=finished_model)
    expected = processor.decode(answer_of("which?", [wide, square]), skip_special_tokens=True)
    for first in ({"image": wide}, {"path": str(tmp_path / "wide.png")}, {"url": str(tmp_path / "wide.png")}):
        content = [{"type": "image", **first}, {"type": "image", "image": square}, {"type": "text", "text": "which?"}]
        [found] = pipe(text=[{"role": "user", "content": content}], return_full_text=False, **GREEDY)
        assert found["generated_text"] == expected
    several = [
        [{"role": "user", "content": [{"type": "image", "image": i}, {"type": "text", "text": t}]}]
        for i, t in ((wide, "what?"), (square, "why is it so?"))
    ]
    found = pipe(text=several, return_full_text=False, **GREEDY)
    assert [one[0]["generated_text"] for one in found] == [
        processor.decode(answer_of(t, [i]), skip_special_tokens=True)
        for i, t in ((wide, "what?"), (square, "why is it so?"))
    ]


_LOAD = """
import sys, json
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
assert not any(name.startswith("meteor") for name in sys.modules)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
images = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=Image.new("RGB", (112, 56)), text="<image>\\nwhat?", return_tensors="pt")
print(json.dumps([type(x).__name__ for x in (config, processor, images, model)]))
print(json.dumps(model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()))
"""


def test_the_pipeline_answers_several_at_a_time(finished_model, make_image):
    sizes = (112, 56), (56, 112), (200, 100), (64, 64)
    questions = [
        [{"role": "user", "content": [{"type": "image", "image": make_image(*size)}, text_part("what? " * n)]}]
        for n, size in enumerate(sizes, start=1)
    ]
    ask = partial(
        pipeline("image-text-to-text", model=str(finished_model), trust_remote_code=True),
        return_full_text=False,
        generate_kwargs=GREEDY,
    )
    alone = [ask(text=question)[0]["generated_text"] for question in questions]
    assert [answer[0]["generated_text"] for answer in ask(text=questions, batch_size=3)] == alone


def run_python(code, *arguments, cwd):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_the_folder_loads_without_an_import_of_this_library(finished_model, model, processor, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    done = run_python(_LOAD, finished_model, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names, tokens = map(json.loads, done.stdout.splitlines())
    assert names == ["MeteorConfig", "MeteorProcessor", "MeteorImageProcessor", "MeteorForConditionalGeneration"]
    from PIL import Image

    inputs = processor(images=Image.new("RGB", (112, 56)), text="<image>\nwhat?", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist() == tokens


def test_a_machine_without_this_library_is_told_to_install_it(finished_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    absent = "import sys; sys.modules['meteor'] = None\n"
    load = "from transformers import AutoConfig\nAutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
    done = run_python(absent + load, finished_model, cwd=tmp_path)
    assert done.returncode == 1
    assert "pip install llava-meteor" in done.stderr.splitlines()[-1]


def test_several_turns_with_images_in_each(model, processor, make_image):
    images = [make_image(112, 56), make_image(56, 56, seed=1)]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "and?"}, {"type": "image"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.endswith("USER: <image>\nwhat? ASSISTANT: a cat</s>USER: <image>\nand? ASSISTANT:")
    inputs = processor(images=images, text=text, return_tensors="pt")
    assert model.generate(**inputs, **GREEDY).shape[1] > inputs["input_ids"].shape[1]
    masked = processor.apply_chat_template(messages[:2], tokenize=False, return_dict=False, add_generation_prompt=False)
    assert masked.endswith("a cat</s>")


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_of_answers_is_that_of_training(processor, make_image, side):
    conversations = [[("what?", 1), ("a cat", 0), ("and?", 1), ("", 0)], [("hello there", 0), (" two words", 0)]]
    roles = "user", "assistant"
    messages = [
        [
            {
                "role": roles[n % 2],
                "content": [{"type": "image", "image": make_image(112, 56)}] * k + [text_part(words)],
            }
            for n, (words, k) in enumerate(turns)
        ]
        for turns in conversations
    ]
    options = {"padding": True, "padding_side": side, "add_special_tokens": False}
    made = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs=options,
    )
    assert "offset_mapping" not in made
    for row, turns in enumerate(conversations):
        conversation = Conversation(
            tuple(Turn(("human", "gpt")[n % 2], words, k) for n, (words, k) in enumerate(turns))
        )
        trained = tokenise(conversation, processor.tokenizer, processor.template)
        labels = made["input_ids"][row][made["assistant_masks"][row].bool()].tolist()
        assert labels == [label for label in trained.labels if label != IGNORE_INDEX]
    spans = processor(text=["<s>USER: hi </s>"], return_offsets_mapping=True)["offset_mapping"][0]
    assert spans[0] == (0, 0)
    assert spans[-1] == (12, 16)


def text_part(words):
    return {"type": "text", "text": words}


def test_prompts_and_answers_do_not_leave_the_models_positions(model, processor, make_image, ask, caplog):
    num_positions = model.config.text_config.max_position_embeddings
    inputs = ask(processor, "what? " * num_positions, [make_image(112, 56)])
    with pytest.raises(TooLongError, match=f"the language model has {num_positions} positions"):
        model.generate(**inputs, **GREEDY)
    inputs = ask(processor, "what?", [make_image(112, 56)])
    never_ends = {"max_new_tokens": num_positions, "do_sample": False, "suppress_tokens": [2]}
    longest = model.generate(**inputs, **never_ends)
    assert longest.shape[1] == num_positions
    assert "where the language model's positions end" in caplog.text


def test_beams_samples_and_several_answers_per_prompt(model, processor, make_image, ask):
    inputs = ask(processor, "what?", [make_image(112, 56)])
    length = inputs["input_ids"].shape[1]
    greedy = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, num_beams=1), greedy)
    beams = model.generate(**inputs, max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False)
    assert beams.shape[0] == 2
    assert torch.equal(beams[:, :length], inputs["input_ids"].expand(2, -1))
    drawn = model.generate(**inputs, max_new_tokens=6, do_sample=True, top_k=5, num_return_sequences=3)
    assert drawn.shape[0] == 3
    # The penalty reads the prompt's ids, image tokens included.
    assert model.generate(**inputs, **GREEDY, repetition_penalty=1.3).shape[0] == 1
    told = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(told.sequences, greedy)


def test_the_most_probable_beam_is_at_least_as_probable_as_the_greedy_answer(model, processor, make_image, ask):
    inputs = ask(processor, "what?", [make_image(56, 56)])
    length = inputs["input_ids"].shape[1]

    def log_probability(tokens):
        with torch.no_grad():
            given = {**inputs, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            log_LV = model(**given).logits[0].log_softmax(-1)
        return float(log_LV[length - 1 : -1].gather(-1, tokens[0, length:, None]).sum())

    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    greedy, best = (model.generate(**inputs, **options, num_beams=beams) for beams in (1, 4))
    assert log_probability(best) >= log_probability(greedy) - 1e-5


def test_half_precision_and_automatic_placement_answer_too(finished_model, processor, make_image, ask, answer_of):
    shown = [make_image(112, 56)]
    inputs = ask(processor, "what?", shown)
    placed = AutoModelForImageTextToText.from_pretrained(finished_model, device_map="auto").eval()
    assert torch.equal(
        placed.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :], answer_of("what?", shown)
    )
    half = AutoModelForImageTextToText.from_pretrained(finished_model, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert half(**inputs.to("cpu", torch.bfloat16)).logits.dtype == torch.bfloat16
    assert half.generate(**inputs, **GREEDY).shape[0] == 1


def test_parts_are_found_by_their_usual_names(model, processor, make_image, ask):
    inputs = ask(processor, "what?", [make_image(112, 56)])
    tokens = model.get_image_features(inputs["pixel_values"], inputs["grids"], inputs["num_slots"])
    assert tokens.shape == (int(inputs["num_slots"].sum()), model.config.text_config.hidden_size)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == len(tokens)
    assert model.config.image_token_id == processor.image_token_id < model.config.text_config.vocab_size
    assert {"LlamaDecoderLayer", "CLIPEncoderLayer"} <= set(model._no_split_modules)
    assert model.get_decoder() is model.language_model.model
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
        torch.testing.assert_close(model.get_output_embeddings()(hidden), model(**inputs).logits)
    assert {id(p) for p in model.base_model.parameters()} < {id(p) for p in model.parameters()}
    assert not [name for name in model.state_dict() if name.startswith("model.")]


def test_a_saved_copy_gives_equal_logits_and_keeps_loading_as_before(model, processor, make_image, ask, tmp_path):
    inputs = ask(processor, "what?", [make_image(112, 56)])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    read = AutoProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**ask(read, "what?", [make_image(112, 56)])).logits, model(**inputs).logits)
    assert AutoConfig.from_pretrained(tmp_path).auto_map == model.config.auto_map


def test_labels_on_the_processors_own_output_give_loss_and_gradients(finished_model, processor, make_image):
    model = MeteorForConditionalGeneration.from_pretrained(finished_model)
    text = "<image>\nwhat? ASSISTANT: a cat</s>"
    inputs = processor([make_image(112, 56)], [text, "no image here"], return_tensors="pt", padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    output = model(**inputs, labels=labels)
    assert output.logits.shape == (*labels.shape, model.config.text_config.vocab_size)
    # transformers' own language model, given the embeddings, is the judge.
    embeds, attended, _ = model.embed(**inputs)
    kept = labels.masked_fill(labels == model.config.image_token_id, -100)
    expected = model.language_model(inputs_embeds=embeds, attention_mask=attended.long(), labels=kept).loss
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)
    output.loss.backward()
    assert all(p.grad is not None for p in model.projector.parameters() if p.requires_grad)


# peft asks for an attribute by the name that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_of_peft_train_are_saved_and_go_on(finished_model, processor, make_image, tmp_path):
    import peft

    def fresh():
        return MeteorForConditionalGeneration.from_pretrained(finished_model)

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(fresh(), config)
    inputs = processor([make_image(112, 56)], "<image>\nwhat? ASSISTANT: a cat</s>", return_tensors="pt")
    labels = inputs["input_ids"].clone()
    adapted(**inputs, labels=labels).loss.backward()
    gradients = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert gradients
    assert all("lora" in name for name in gradients)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter", is_trainable=True)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, adapted(**inputs).logits)
    assert adapted.generate(**inputs, **GREEDY).shape[0] == 1
    again(**inputs, labels=labels).loss.backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("with_lora", [False, True])
def test_ten_steps_of_trls_trainer_on_images_lower_the_loss(finished_model, make_image, tmp_path, with_lora):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    folder = shutil.copytree(finished_model, tmp_path / "model")
    rows = [
        {
            "images": [make_image(112, 56, seed=i)],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
            ],
        }
        for i in range(8)
    ]
    trainer = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder),
        processing_class=AutoProcessor.from_pretrained(folder),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]) if with_lora else None,
        args=SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=10,
            per_device_train_batch_size=4,
            learning_rate=2e-2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            max_length=None,
            assistant_only_loss=not with_lora,
            use_cpu=True,
            bf16=False,
        ),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 10
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_transformers_serve_answers_about_an_image_over_openais_api(
    finished_model, processor, make_image, png, answer_of
):
    shown = make_image(112, 56)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", finished_model, "--trust-remote-code"]
    server = subprocess.Popen([*command, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)])
    url = "data:image/png;base64," + base64.b64encode(png(shown)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    request = {
        "model": finished_model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 6,
        "temperature": 0,
        "stream": False,
    }
    try:
        reply = _post(f"http://127.0.0.1:{port}/v1/chat/completions", request, server)
    finally:
        server.terminate()
        server.wait(timeout=30)
    expected = processor.decode(answer_of("what?", [shown]), skip_special_tokens=True)
    assert reply["choices"][0]["message"]["content"].strip() == expected.strip()


def _post(url, content, server):
    """Post JSON as soon as the server listens."""
    deadline = time.monotonic() + 120
    while True:
        assert server.poll() is None, "the server ended"
        try:
            request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except urllib.error.URLError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
