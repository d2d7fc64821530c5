"""What a stage leaves behind is what it trained: exported from a checkpoint, then loaded as its users load it."""

import json

import pytest
import torch
from safetensors import safe_open
from saving import save_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor

from meteor import storage
from meteor.checkpoint.folder import complete_checkpoints
from meteor.checkpoint.format import Checkpoint
from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.errors import CacheMismatchError
from meteor.model import MeteorForConditionalGeneration, MeteorImageProcessor, MeteorProcessor
from meteor.model.trained_projector import load_trained_projector, projector_metadata
from meteor.text.tokenizer import load_tokenizer
from meteor.text.tokens import TokenisedSample
from meteor.train.build import build_model, freeze_for, load_projector
from meteor.train.engine import make_engine
from meteor.train.export import export_model, export_projector
from meteor.vision.encoder import FrozenEncoder, read_vision_config

V, X = IMAGE_PLACE, IGNORE_INDEX


@pytest.fixture(scope="module")
def encoder(clip_folder):
    return FrozenEncoder.from_pretrained(clip_folder)


@pytest.fixture
def build(llm_folder, clip_folder, encoder):
    def make(*, dtype=torch.float32, digest=None, seed=0):
        identity = {
            "encoder_digest": digest or encoder.weights_digest,
            "encoder_dtype": "float32",
            "select_layer": -2,
            "preprocessing": encoder.preprocessing,
            "slicing": {"max_slices": 6, "resolution": 56, "patch_size": 14},
            "versions": {"slicing": 1, "resizing": 1, "encoding": 1},
        }
        return build_model(
            llm_path=llm_folder,
            vision_config=read_vision_config(clip_folder),
            projector={"name": "meteor", "k": 4},
            select_layer=-2,
            cache_identity=identity,
            dtype=dtype,
            seed=seed,
            image_token_id=57,
        )

    return make


@pytest.fixture
def train_a_little(make_features, make_batch, tmp_path):
    """Two steps of a stage; the checkpoint they leave."""

    def train(model, stage):
        freeze_for(model, stage)
        batch = make_batch(
            [(TokenisedSample([1, V, 20, 2], [X, X, 20, 2]), [make_features("a", sliced=True)])], image_id=57
        )
        engine = make_engine(
            model,
            zero_stage=0,
            dtype=next(model.parameters()).dtype,
            device=torch.device("cpu"),
            max_grad_norm=1.0,
            empty_inputs=batch.as_inputs(),
        )
        for _ in range(2):
            engine.forward_backward({**batch.as_inputs(), "num_items_in_batch": 2}, last=True)
            engine.step(lr=1e-2)
        save_checkpoint(engine, str(tmp_path / "checkpoints"), 2, epoch=0, keep=1)
        return Checkpoint(complete_checkpoints(str(tmp_path / "checkpoints"))[-1])

    return train


@pytest.fixture
def processor(tokenizer_folder):
    images = MeteorImageProcessor(resolution=56, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return MeteorProcessor(images, load_tokenizer(tokenizer_folder), {"name": "meteor", "k": 4})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stage_one_leaves_the_projectors_masters_with_what_they_are_for(build, train_a_little, tmp_path, dtype):
    model = build(dtype=dtype)
    checkpoint = train_a_little(model, "pretrain")
    uri = str(tmp_path / "projector.safetensors")
    export_projector(model, checkpoint, uri)
    with safe_open(uri, "pt") as file:
        assert json.loads(file.metadata()["meteor"]) == projector_metadata(model.config)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    assert weights.keys() == model.projector.state_dict().keys()
    for name, value in weights.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, checkpoint.read("weights", f"projector.{name}"))
        assert torch.equal(value.to(dtype), model.projector.state_dict()[name])
    stage_two = build(seed=9)
    load_projector(stage_two, uri)
    torch.testing.assert_close(stage_two.projector.state_dict(), weights, rtol=0, atol=0)
    by_itself = load_trained_projector(uri, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(by_itself.module.state_dict(), weights, rtol=0, atol=0)


def test_stage_two_leaves_a_directory_that_loads_as_the_trained_model(
    build, train_a_little, encoder, processor, make_image, ask, tmp_path
):
    trained = build()
    checkpoint = train_a_little(trained, "finetune")
    fresh = build(seed=9)
    freeze_for(fresh, "finetune")
    folder = str(tmp_path / "model")
    export_model(fresh, checkpoint, encoder, processor, folder, torch.float32)
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert isinstance(loaded, MeteorForConditionalGeneration)
    assert not any(info.values())
    for room in ("projector", "language_model"):
        truth = getattr(trained, room).state_dict()
        torch.testing.assert_close(getattr(loaded, room).state_dict(), truth, rtol=0, atol=0)
    by_itself = load_trained_projector(folder, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(by_itself.module.state_dict(), trained.projector.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(loaded.vision_tower.state_dict(), encoder.model.state_dict(), rtol=0, atol=0)
    assert loaded.config.cache_identity == trained.config.cache_identity
    # It sees images by itself.
    inputs = ask(AutoProcessor.from_pretrained(folder), "what?", [make_image(112, 56)])
    answer = loaded.generate(**inputs, min_new_tokens=3, max_new_tokens=3, do_sample=False)
    assert answer.shape == (1, inputs["input_ids"].shape[1] + 3)
    assert torch.equal(answer[:, :-3], inputs["input_ids"])


def test_answers_end_with_the_token_that_was_taught_and_the_language_models_own(
    build, train_a_little, encoder, processor, tmp_path
):
    chat = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    processor.tokenizer.chat_template = chat
    chatty = MeteorProcessor(processor.image_processor, processor.tokenizer, processor.projector, "chat")
    model = build()
    export_model(model, train_a_little(model, "finetune"), encoder, chatty, str(tmp_path / "model"), torch.float32)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert loaded.generation_config.eos_token_id == [chatty.tokenizer.convert_tokens_to_ids("<|end|>"), 2]
    assert loaded.generation_config.pad_token_id == chatty.tokenizer.pad_token_id


def test_only_the_encoder_keeps_its_type_and_is_still_the_one_of_the_cache(
    build, train_a_little, encoder, processor, tmp_path
):
    model = build()
    checkpoint = train_a_little(model, "finetune")
    folder = str(tmp_path / "model")
    export_model(model, checkpoint, encoder, processor, folder, torch.bfloat16)
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        stored = {(name.split(".")[0], file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
    assert stored == {("vision_tower", "F32"), ("projector", "BF16"), ("language_model", "BF16")}
    loaded = MeteorForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert FrozenEncoder(loaded.vision_tower).weights_digest == encoder.weights_digest
    halves = MeteorForConditionalGeneration.from_pretrained(folder, vision_tower=False, dtype=torch.bfloat16)
    for name, value in halves.projector.state_dict().items():
        assert torch.equal(value, checkpoint.read("weights", f"projector.{name}").bfloat16()), name


def test_the_configuration_is_written_last(build, train_a_little, encoder, processor, tmp_path, monkeypatch):
    model = build()
    checkpoint = train_a_little(model, "finetune")
    uploaded = []
    for name in ("upload_file", "write_bytes"):
        original = getattr(storage, name)
        monkeypatch.setattr(
            storage, name, lambda *given, original=original, **more: (uploaded.append(given), original(*given, **more))
        )
    export_model(model, checkpoint, encoder, processor, str(tmp_path / "model"), torch.float32)
    names = [str(value).removeprefix(f"{tmp_path}/model/") for given in uploaded for value in given[:2]]
    names = [name for name in names if "/" not in name and "{" not in name]
    assert names[-2:] == ["config.json", "checksums.json"]
    assert {"model.safetensors", "tokenizer.json", "processor_config.json"} < set(names)


def test_an_encoder_other_than_the_caches_is_refused_before_anything_is_written(
    build, train_a_little, encoder, processor, tmp_path
):
    model = build(digest="f" * 64)
    checkpoint = train_a_little(model, "finetune")
    with pytest.raises(CacheMismatchError, match=f"made by {'f' * 64}, vision.path holds {encoder.weights_digest}"):
        export_model(model, checkpoint, encoder, processor, str(tmp_path / "model"), torch.float32)
    assert not (tmp_path / "model").exists()
