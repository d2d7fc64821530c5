import io
import json

import pytest
import torch
from PIL import ExifTags, Image
from transformers import AutoProcessor

from meteor.constants import IMAGE_TOKEN_ID
from meteor.data.collate import collate
from meteor.errors import BadImageError, ConversationError, SettingsError
from meteor.image.pixels import PixelSettings, slice_bytes
from meteor.image.transform import normalise
from meteor.model import MeteorConfig, MeteorProcessor
from meteor.text.conversation import Conversation, Turn
from meteor.text.tokens import Separators, load_tokenizer, tokenise
from meteor.vision.encode_images import encode_sliced

PIXELS = PixelSettings(resolution=56, max_aspect_ratio=8)
PROJECTOR = {"name": "meteor", "k": 4}
V = IMAGE_TOKEN_ID


@pytest.fixture
def make_processor(tokenizer_folder):
    def make(**changes):
        settings = {"projector": PROJECTOR, "pixels": PIXELS, "mean": [0.5] * 3, "std": [0.5] * 3}
        return MeteorProcessor(load_tokenizer(tokenizer_folder), **{**settings, **changes})

    return make


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
        samples.append([(tokens, encode_sliced(sliced, model.frozen_clip()))])
        pixels += [normalise(sub, processor.mean, processor.std) for one in sliced for sub in one.sub_images]
    batch = collate(
        samples,
        budget=processor.budget,
        separators=processor.separators,
        pad_id=processor.tokenizer.pad_token_id,
        vision_width=16,
        select_layer=-2,
        padding_side="left",
    )
    return batch, pixels


def test_questions_become_what_training_makes_of_their_files(make_processor, make_model, make_image):
    model, processor = make_model(vision_tower=True).eval(), make_processor()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # lies on its side: 56 x 112 as stored, 112 x 56 as shown
    wide, wide_opened = as_opened(make_image(56, 112), exif=exif)
    glass, glass_opened = as_opened(make_image(56, 56, mode="RGBA", seed=1))
    grey, grey_opened = as_opened(make_image(56, 150, seed=2).convert("L"))
    batch, pixels = training_inputs(processor, model, [("what is it?", [wide]), ("hm", []), ("which?", [glass, grey])])
    inputs = processor(["what is it?", "hm", "which?"], [[wide_opened], [], [glass_opened, grey_opened]])
    assert torch.equal(inputs["input_ids"], batch.input_ids)
    assert torch.equal(inputs["attention_mask"], batch.attention_mask)
    assert torch.equal(inputs["num_slots"], batch.num_slots)
    assert len(inputs["pixel_values"]) == len(pixels) == 3 + 1 + 4
    for one, other in zip(inputs["pixel_values"], pixels, strict=True):
        assert torch.equal(one, other)
    # And so the answers are the same, whether the images come as pixels or as features.
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**batch.as_inputs(), **options))


def test_the_prompt_of_a_sliced_image_is_as_written_by_hand(make_processor, make_image):
    processor = make_processor()
    ids = processor("ok?", [make_image(112, 56)])["input_ids"][0].tolist()
    start = ids.index(V)
    end = len(ids) - ids[::-1].index(V)
    assert ids[start:end] == [*[V] * 4, *[V] * 4, 3, *[V] * 4]
    assert processor.tokenizer.decode(ids[end:]) == "\n\nok? ASSISTANT:"  # the row's end, and the template's newline
    assert processor.tokenizer.decode(ids[:start]).endswith("questions. USER: ")


@pytest.mark.parametrize("text", ["<image>\nwhat?", "what?<image>", "what?\n<image>"])
def test_a_placeholder_may_stand_anywhere_or_be_left_out(make_processor, make_image, text):
    processor, shown = make_processor(), make_image(56, 56)
    assert torch.equal(processor(text, [shown])["input_ids"], processor("what?", [shown])["input_ids"])


@pytest.mark.parametrize(("text", "num_images"), [("<image>\nwhat?", 2), ("<image><image>what?", 1), ("<image>?", 0)])
def test_placeholders_must_be_as_many_as_images(make_processor, make_image, text, num_images):
    with pytest.raises(ConversationError, match=f"for {num_images} images"):
        make_processor()(text, [make_image(56, 56)] * num_images)


def test_a_question_without_images_runs_through_the_model(make_processor, make_model):
    inputs = make_processor()("what?")
    assert (inputs["num_slots"].tolist(), inputs["pixel_values"]) == ([0], [])
    assert V not in inputs["input_ids"]
    assert make_model(vision_tower=True).generate(**inputs, max_new_tokens=2, do_sample=False).shape == (1, 2)


def test_an_image_of_a_refused_shape_is_refused(make_processor, make_image):
    with pytest.raises(BadImageError, match="aspect ratio"):
        make_processor()("what?", [make_image(90, 10)])


def test_answers_are_decoded_without_special_tokens_and_outer_spaces(make_processor):
    processor = make_processor()
    ids = processor.tokenizer.convert_tokens_to_ids(list(" a cat"))
    assert processor.batch_decode(torch.tensor([[*ids, 2, 2]])) == ["a cat"]


def test_a_saved_processor_does_the_same_when_loaded(make_processor, make_image, tmp_path):
    saved = make_processor(projector={"name": "meteor", "k": 3}, template="plain", separators=Separators(40, 41))
    saved.save_pretrained(tmp_path)
    MeteorConfig(cache_identity=None).save_pretrained(tmp_path)
    for loaded in (MeteorProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, MeteorProcessor)
        assert (loaded.pixels, loaded.template, loaded.separators) == (PIXELS, "plain", Separators(40, 41))
        one, other = (processor("what?", [make_image(112, 56)]) for processor in (saved, loaded))
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert 40 in one["input_ids"]
        for pixels, others in zip(one["pixel_values"], other["pixel_values"], strict=True):
            assert torch.equal(pixels, others)


def test_a_directory_without_a_processor_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SettingsError, match="no processor_config"):
        MeteorProcessor.from_pretrained(str(tmp_path))


def test_a_model_of_global_views_gets_global_views_alone(make_processor, make_image):
    shown = make_image(200, 100)
    whole = make_processor(sub_images="global")("What?", [shown])
    sliced = make_processor()("What?", [shown])
    assert len(whole["pixel_values"]) == 1 < len(sliced["pixel_values"])
    assert torch.equal(whole["pixel_values"][0], sliced["pixel_values"][0])
    assert int((whole["input_ids"] == IMAGE_TOKEN_ID).sum()) == int(whole["num_slots"].sum())
