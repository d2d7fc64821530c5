"""The adapter with lmms-eval's real base class and registry."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lmms_eval", reason="the extra is not installed: pip install 'llava-meteor[lmms-eval]'")

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelRegistryV2

from meteor.errors import SettingsError
from meteor.evaluation.lmms import LlavaMeteor, LlavaMeteorChat, manifest

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model(finished_model, make_image):
    model = LlavaMeteor(pretrained=finished_model, batch_size=2, device="cpu")
    shown_images = [make_image(112, 56, seed=0), make_image(56, 56, seed=1)]
    documents = [{"images": shown_images[:1]}, {"images": []}, {"images": shown_images}, {"images": ["a_video.mp4"]}]
    model.task_dict = {"task": {"test": documents}}
    return model


def request(context, doc_id, **options):
    return SimpleNamespace(args=(context, options, lambda document: document["images"], doc_id, "task", "test"))


def test_lmms_eval_finds_the_model_by_its_entry_point():
    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("llava_meteor") is LlavaMeteorChat
    assert registry.get_model_class("llava_meteor", force_simple=True) is LlavaMeteor
    assert issubclass(LlavaMeteor, lmms)
    assert manifest().model_id == "llava_meteor"


def test_answers_come_in_order_cut_at_stop_texts_and_are_the_models_own(model, ask):
    asked = [("what?", 0, 6), ("<image>\nwhy is it red?", 2, 6), ("hello?", 1, 3)]
    requests = [request(text, doc, max_new_tokens=longest) for text, doc, longest in asked]
    answers = model.generate_until(requests)
    processor = model._answerer.processor
    for (text, doc, longest), answer in zip(asked, answers, strict=True):
        images = model.task_dict["task"]["test"][doc]["images"]
        inputs = ask(processor, text.replace("<image>", "").strip(), images)
        tokens = model._answerer.model.generate(
            **inputs, max_new_tokens=longest, do_sample=False, eos_token_id=2, pad_token_id=2
        )
        assert model._answerer.decode(tokens[:, inputs["input_ids"].shape[1] :]) == [answer]
    stop = answers[0][1]
    assert model.generate_until([request("what?", 0, max_new_tokens=6, until=[stop])]) == [
        answers[0].split(stop)[0].strip()
    ]


def test_a_continuations_likelihood_is_that_of_one_token_after_the_other(model, ask):
    def likelihood(target):
        visuals = lambda document: document["images"]  # noqa: E731
        return model.loglikelihood([SimpleNamespace(args=("what?", target, visuals, 0, "task", "test"))])[0]

    inputs = ask(model._answerer.processor, "what?", model.task_dict["task"]["test"][0]["images"])
    tokenizer = model._answerer.processor.tokenizer
    expected, all_greedy = 0.0, True
    for token in [*tokenizer(" abc", add_special_tokens=False).input_ids, tokenizer.eos_token_id]:
        with torch.inference_mode():
            log_probability = model._answerer.model(**inputs).logits[0, -1].float().log_softmax(-1)
        expected += float(log_probability[token])
        all_greedy &= int(log_probability.argmax()) == token
        for name, value in (("input_ids", token), ("attention_mask", 1)):
            inputs[name] = torch.cat([inputs[name], torch.tensor([[value]])], dim=1)
    found, greedy = likelihood("abc")
    assert found == pytest.approx(expected, rel=1e-4)
    assert greedy is all_greedy
    assert likelihood(lambda document: "abc") == (found, greedy)


def test_what_it_cannot_do_is_said(model, finished_model):
    with pytest.raises(SettingsError, match="videos"):
        model.generate_until([request("what?", 3)])
    with pytest.raises(SettingsError, match="one round"):
        model.generate_until_multi_round([])
    with pytest.raises(SettingsError, match="does not know conv_template"):
        LlavaMeteor(pretrained=finished_model, device="cpu", conv_template="vicuna_v1")
    assert model._answerer.model.dtype == torch.float32


def chat_request(doc_to_messages, doc_id, **options):
    return SimpleNamespace(args=("context", doc_to_messages, options, doc_id, "task", "test"))


def messages_of(document, words="what?"):
    images = [{"type": "image", "url": image} for image in document["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": words}]}]


def test_messages_get_the_answers_of_the_simple_form(model, finished_model):
    chat = LlavaMeteorChat(pretrained=finished_model, batch_size=2, device="cpu")
    chat.task_dict = model.task_dict
    simple = model.generate_until([request("what?", doc, max_new_tokens=6) for doc in (0, 1, 2)])
    assert chat.generate_until([chat_request(messages_of, doc, max_new_tokens=6) for doc in (0, 1, 2)]) == simple


def test_examples_and_a_system_prompt_become_turns(model, finished_model, ask):
    chat = LlavaMeteorChat(pretrained=finished_model, batch_size=2, device="cpu")
    chat.task_dict = model.task_dict

    def with_example(document):
        system = [{"role": "system", "content": [{"type": "text", "text": "be brief."}]}]
        answer = [{"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]
        return [*system, *messages_of(document), *answer, *messages_of({"images": []}, "why?")]

    [found] = chat.generate_until([chat_request(with_example, 0, max_new_tokens=6)])
    processor, document = chat._answerer.processor, model.task_dict["task"]["test"][0]
    text = processor.apply_chat_template(
        [
            {**one, "content": [{**part, "image": part.get("url")} for part in one["content"]]}
            for one in with_example(document)
        ],
        add_generation_prompt=True,
    )
    assert "be brief. USER: <image>\nwhat? ASSISTANT: a cat</s>USER: why? ASSISTANT:" in text
    inputs = processor(document["images"], text, return_tensors="pt")
    tokens = chat._answerer.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert chat._answerer.decode(tokens[:, inputs["input_ids"].shape[1] :]) == [found]


def test_videos_in_messages_are_refused(model, finished_model):
    chat = LlavaMeteorChat(pretrained=finished_model, device="cpu")
    chat.task_dict = model.task_dict
    video = lambda document: [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]  # noqa: E731
    with pytest.raises(SettingsError, match="videos"):
        chat.generate_until([chat_request(video, 0)])
