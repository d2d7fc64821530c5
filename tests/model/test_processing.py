import io
import json

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import AutoImageProcessor, AutoProcessor, BatchFeature

from meteor.data.collate import ImageLayout, collate, expand_images
from meteor.errors import BadImageError, DataError, SettingsError
from meteor.image.pixels import PixelSettings, slice_bytes
from meteor.image.transform import normalise
from meteor.model import MeteorConfig, MeteorImageProcessor, MeteorProcessor
from meteor.model.image_processing import pack_pixels, unpack_pixels
from meteor.text.conversation import Conversation, Turn
from meteor.text.tokenizer import load_tokenizer
from meteor.text.tokens import tokenise
from meteor.vision.encode_images import encode_sliced

PIXELS = PixelSettings(resolution=56, max_aspect_ratio=8)
PROJECTOR = {"name": "meteor", "k": 4}


@pytest.fixture
def make_processor(tokenizer_folder):
    def make(sub_images="all", **changes):
        images = MeteorImageProcessor(**vars(PIXELS), image_mean=[0.5] * 3, image_std=[0.5] * 3, sub_images=sub_images)
        tokenizer = load_tokenizer(tokenizer_folder)
        tokenizer.padding_side = "left"
        return MeteorProcessor(images, tokenizer, **{"projector": PROJECTOR, **changes})

    return make


def message(words, num_images=0):
    return {"role": "user", "content": [*[{"type": "image"}] * num_images, {"type": "text", "text": words}]}


def ask(processor, words, images=()):
    """The inputs of one question, as a user prepares them."""
    prompt = processor.apply_chat_template([message(words, len(images))], add_generation_prompt=True)
    return processor(images=list(images), text=prompt, return_tensors="pt")


def as_opened(image, **options):
    """The file's bytes, and the image as ``PIL.Image.open`` gives it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue(), Image.open(io.BytesIO(buffer.getvalue()))


def training_inputs(processor, model, questions):
    """(words, files) of each question by the way that training takes: file bytes, features, samples, collate."""
    samples, pixels = [], []
    for words, files in questions:
        sliced = [slice_bytes(data, "key", PIXELS) for data in files]
        conversation = Conversation((Turn("human", words, len(files)), Turn("gpt", "what it says")))
        tokens = tokenise(conversation, processor.tokenizer, "vicuna_v1", for_generation=True)
        samples.append([(tokens, encode_sliced(sliced, model.frozen_encoder()))])
        pixels += [
            normalise(sub, processor.image_processor.image_mean, processor.image_processor.image_std)
            for one in sliced
            for sub in one.sub_images
        ]
    batch = collate(
        samples,
        budget=processor.budget,
        visual_tokens=processor.visual_tokens,
        pad_id=processor.tokenizer.pad_token_id,
        vision_width=16,
        select_layer=-2,
        padding_side="left",
    )
    return batch, pixels


def test_questions_become_what_training_makes_of_their_files(make_processor, make_model, make_image):
    processor = make_processor()
    model = make_model(vision_tower=True, image_token_id=processor.image_token_id).eval()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # lies on its side: 56 x 112 as stored, 112 x 56 as shown
    wide, wide_opened = as_opened(make_image(56, 112), exif=exif)
    glass, glass_opened = as_opened(make_image(56, 56, mode="RGBA", seed=1))
    grey, grey_opened = as_opened(make_image(56, 150, seed=2).convert("L"))
    batch, pixels = training_inputs(processor, model, [("what is it?", [wide]), ("hm", []), ("which?", [glass, grey])])
    prompts = [
        processor.apply_chat_template([message(*question)], add_generation_prompt=True)
        for question in (("what is it?", 1), ("hm", 0), ("which?", 2))
    ]
    inputs = processor([[wide_opened], [], [glass_opened, grey_opened]], prompts, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "num_slots", "grids"):
        assert torch.equal(inputs[name], getattr(batch, name)), name
    assert torch.equal(inputs["pixel_values"], pack_pixels(pixels, processor.image_processor.patch_size))
    assert len(pixels) == 3 + 1 + 4
    # And so the answers are the same, whether the images come as pixels or as features.
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**batch.as_inputs(), **options))


@pytest.mark.parametrize("template", ["vicuna_v1", "plain"])
@pytest.mark.parametrize("num_images", [1, 2])
def test_tokens_turns_and_images_of_a_prompt_are_those_of_its_conversation(
    make_processor, make_image, template, num_images
):
    processor = make_processor(template=template, text_sampler=True)
    texts = ["what?", "a cat.", "", "no", "sure: ASSISTANT?"] if template == "vicuna_v1" else ["what?"]
    turns = tuple(Turn("gpt" if n % 2 else "human", text, 0 if n % 2 else num_images) for n, text in enumerate(texts))
    messages = [
        {"role": "assistant", "content": turn.text} if turn.role == "gpt" else message(turn.text, turn.num_images)
        for turn in turns
    ]
    expected = tokenise(Conversation(turns), processor.tokenizer, template, for_generation=True)
    images = [make_image(56, 56)] * sum(turn.num_images for turn in turns)
    plan = PIXELS.plan(56, 56)
    layouts = [ImageLayout(plan.grid, plan.patch_grids)] * len(images)
    longer, _ = expand_images(expected, layouts, processor.budget, processor.visual_tokens)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images, prompt, return_tensors="pt")
    for name in ("input_ids", "turns", "image_numbers"):
        assert inputs[name][0].tolist() == getattr(longer, name), name


def test_the_prompt_of_a_sliced_image_is_as_written_by_hand(make_processor, make_image):
    processor = make_processor()
    ids = ask(processor, "ok?", [make_image(112, 56)])["input_ids"][0].tolist()
    slot = processor.image_token_id
    start = ids.index(slot)
    end = len(ids) - ids[::-1].index(slot)
    assert ids[start:end] == [*[slot] * 4, *[slot] * 4, 3, *[slot] * 4]
    assert processor.tokenizer.decode(ids[end:]) == "\n\nok? ASSISTANT:"  # the row's end, and the template's newline
    assert processor.tokenizer.decode(ids[:start]).endswith("questions. USER: ")


@pytest.mark.parametrize("text", ["<image>\nwhat?", "what?<image>", "what?\n<image>"])
def test_a_placeholder_in_a_message_moves_to_its_front(make_processor, text):
    processor = make_processor()
    expected = processor.apply_chat_template([message("what?", 1)], add_generation_prompt=True)
    found = processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    assert found == expected


def test_images_come_first_if_no_prompt_says_where_they_belong(make_processor, make_image, caplog):
    processor, image = make_processor(), make_image(112, 56)
    expected = processor(image, "<image>\nwhat?", return_tensors="pt")
    assert not caplog.records
    for images in (image, [image], [[image]]):
        found = processor(images=images, text="what?", return_tensors="pt")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "no prompt has <image>" in caplog.text
    two = processor([[image], [image, image]], ["a?", "b?"])
    slots = int(expected["num_slots"].sum())
    assert [row.count(processor.image_token_id) for row in two["input_ids"]] == [slots, 2 * slots]
    with pytest.raises(ValueError, match="a list of images for each prompt"):
        processor([image, image], ["a?", "b?"])
    with pytest.raises(ValueError, match="images come first"):
        processor("what?", image)


@pytest.mark.parametrize(("text", "num_images"), [("<image>\nwhat?", 2), ("<image><image>what?", 1), ("<image>?", 0)])
def test_placeholders_must_be_as_many_as_images(make_processor, make_image, text, num_images):
    with pytest.raises(ValueError, match="<image>"):
        make_processor()([make_image(56, 56)] * num_images or None, text)


def test_one_image_is_as_good_as_a_list_and_an_array_as_an_image(make_processor, make_image):
    processor, shown = make_processor(), make_image(112, 56)
    ways = (shown, [shown], [[shown]], np.asarray(shown), torch.from_numpy(np.asarray(shown).copy()).permute(2, 0, 1))
    first, *others = [processor(way, "<image>?", return_tensors="pt") for way in ways]
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert isinstance(first.to("cpu", torch.bfloat16), BatchFeature)
    assert first["pixel_values"].dtype == torch.bfloat16


def test_a_question_without_images_runs_through_the_model(make_processor, make_model):
    inputs = ask(make_processor(), "what?")
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    model = make_model(vision_tower=True)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


def test_prompts_of_different_lengths_are_lists_without_padding_and_cannot_be_tensors(make_processor, make_image):
    processor, images = make_processor(), [make_image(56, 56)]
    texts = ["<image>\nlong question?", "short?"]
    lists = processor(images, texts, padding=False)["input_ids"]
    padded = processor(images, texts)
    assert [len(row) for row in lists] == [sum(mask) for mask in padded["attention_mask"]]
    assert [row[-len(short) :] for row, short in zip(padded["input_ids"], lists, strict=True)] == lists
    with pytest.raises(ValueError, match="padding=True"):
        processor(images, texts, padding=False, return_tensors="pt")


def test_text_can_be_cut_and_images_cannot(make_processor, make_image):
    processor, images = make_processor(), [make_image(56, 56)]
    whole = processor(images, "<image>\na question", return_tensors="pt")["input_ids"]
    cut = processor(images, "<image>\na question", return_tensors="pt", truncation=True, max_length=8)["input_ids"]
    assert torch.equal(cut, whole[:, :8])
    with pytest.raises(ValueError, match="would cut an image"):
        processor(images, "<image>\na question", return_tensors="pt", truncation=True, max_length=3)


def test_an_image_of_a_refused_shape_is_refused(make_processor, make_image):
    with pytest.raises(BadImageError, match="aspect ratio"):
        ask(make_processor(), "what?", [make_image(90, 10)])


def test_answers_are_decoded_without_special_tokens(make_processor):
    processor = make_processor()
    ids = [*processor.tokenizer.convert_tokens_to_ids(list("a cat")), 2, 2]
    assert processor.batch_decode(torch.tensor([ids]), skip_special_tokens=True) == ["a cat"]
    assert processor.decode(ids, skip_special_tokens=True) == "a cat"
    assert processor.post_process_image_text_to_text(torch.tensor([ids])) == ["a cat"]


def test_a_saved_processor_does_the_same_when_loaded(make_processor, make_image, tmp_path):
    saved = make_processor(projector={"name": "meteor", "k": 3}, template="plain", text_sampler=True)
    saved.save_pretrained(tmp_path)
    MeteorConfig(cache_identity=None).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"preprocessor_config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json"} <= names
    for loaded in (MeteorProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, MeteorProcessor)
        assert (loaded.image_processor.pixels, loaded.template) == (PIXELS, "plain")
        assert loaded.chat_template == saved.chat_template
        one, other = (ask(processor, "what?", [make_image(112, 56)]) for processor in (saved, loaded))
        assert all(torch.equal(one[name], other[name]) for name in one)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(make_image(112, 56), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, one["pixel_values"])


def test_k_of_a_processor_or_of_a_call_is_the_number_of_slots(make_processor, make_model, make_image, tmp_path):
    processor = make_processor(projector={"name": "meteor", "k": [1, 2, 4]})
    image, prompt = make_image(112, 56), "<image>\nwhat?"

    def slots(**options):
        return processor(images=image, text=prompt, return_tensors="pt", **options)["num_slots"].tolist()

    assert slots() == [4, 4, 4]
    assert slots(k=2) == [2, 2, 2]
    processor.k = 1
    assert (slots(), slots(k=2)) == ([1, 1, 1], [2, 2, 2])
    processor.save_pretrained(tmp_path)
    processor = MeteorProcessor.from_pretrained(tmp_path)
    assert slots() == [1, 1, 1]
    model = make_model({"name": "meteor", "k": [1, 2, 4]}, vision_tower=True, image_token_id=processor.image_token_id)
    inputs = processor(images=image, text=prompt, return_tensors="pt", k=2)
    features = model.get_image_features(*(inputs[name] for name in ("pixel_values", "grids", "num_slots")))
    assert features.shape == (6, 32)
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_a_number_that_the_projector_cannot_make_is_refused(make_processor, make_image):
    processor = make_processor(projector={"name": "mlp"})
    with pytest.raises(SettingsError, match="k=2: projector 'mlp' has no k"):
        processor(images=make_image(112, 56), text="<image>", k=2)


def test_a_directory_without_a_processor_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SettingsError, match="no processor_config"):
        MeteorProcessor.from_pretrained(str(tmp_path))


def test_a_model_of_global_views_gets_global_views_alone(make_processor, make_image):
    shown = make_image(200, 100)
    whole, sliced = (ask(make_processor(sub_images=name), "What?", [shown]) for name in ("global", "all"))
    assert len(whole["grids"]) == 1 < len(sliced["grids"])
    assert torch.equal(whole["pixel_values"], sliced["pixel_values"][: len(whole["pixel_values"])])
    assert int((whole["input_ids"] == make_processor().image_token_id).sum()) == int(whole["num_slots"].sum())


def test_packed_patches_are_unpacked_to_the_same_sub_images():
    images = [torch.randn(3, 28, 56), torch.randn(3, 42, 14)]
    packed = pack_pixels(images, 14)
    # A patch keeps its colour channels, rows and columns.
    assert torch.equal(packed[5].view(3, 14, 14), images[0][:, 14:28, 14:28])
    grids = [(2, 4), (3, 1)]
    for again, image in zip(unpack_pixels(packed, grids, 14), images, strict=True):
        assert torch.equal(again, image)
    with pytest.raises(DataError, match="has 11 patches, and grids describes 12"):
        unpack_pixels(packed, [(2, 4), (4, 1)], 14)
