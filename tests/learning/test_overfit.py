"""It learns, and it looks: the same question has different answers for different images, and only the image tells.

Real parts from file to answer: decode, slice, encode, cache, table, order, projector, splice, labels, loss, engine, checkpoint,
export, load, generate. Only Ray is left out (tests/pipelines has it).
"""

import hashlib
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from contrast import make_contrast_set
from published import PUBLISHED
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig, Qwen3Config

from meteor.cache import CacheIdentity, FeatureCache, commit, create_cache, encode_row, get_codec, write_feature_file
from meteor.checkpoint.folder import complete_checkpoints
from meteor.checkpoint.format import Checkpoint
from meteor.data.collate import collate
from meteor.data.indexed_images import IndexedImage, IndexedImages
from meteor.data.sample_sets import SampleSet
from meteor.data.samples import Sample, load_samples
from meteor.data.table_plan import plan_table
from meteor.data.token_table import tokenise_set
from meteor.evaluation.answer import Answerer
from meteor.evaluation.questions import Question, last_answer
from meteor.evaluation.scoring import exact_match
from meteor.image.budget import visual_token_budget
from meteor.image.pixels import PixelSettings, slice_bytes
from meteor.model import MeteorImageProcessor, MeteorProcessor
from meteor.synthetic.models import TinyModels, make_tiny_models
from meteor.text.tokenizer import find_visual_tokens, load_tokenizer
from meteor.train.build import build_model, freeze_for
from meteor.train.engine import make_engine
from meteor.train.export import export_model
from meteor.train.loop import train
from meteor.train.plan import Recipe, StepPlan
from meteor.vision.encode_images import encode_sliced
from meteor.vision.encoder import FrozenEncoder

PIXELS = PixelSettings(resolution=112)
PROJECTOR = {"name": "meteor", "k": 8, "state_size": 4}
NUM_ANSWERS = 4


# Language models of other architectures, with random weights and the chat templates of their kind.
CHAT_MODELS = {
    "qwen 3": Qwen3Config(head_dim=16),
    "gemma 2": Gemma2Config(head_dim=16, query_pre_attn_scalar=16, sliding_window=512, attn_implementation="eager"),
}


class Work(NamedTuple):
    """Images with questions, their features, and the models that made them."""

    models: TinyModels
    samples: list[Sample]
    images: dict[str, IndexedImage]
    cache: FeatureCache
    encoder: FrozenEncoder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    torch.set_num_threads(2)
    folder = tmp_path_factory.mktemp("work")
    models = make_tiny_models(folder / "models", train_steps=120)
    contrast = make_contrast_set(folder / "contrast", num_samples=64, num_answers=NUM_ANSWERS)
    encoder = FrozenEncoder.from_pretrained(str(models.clip))
    samples, problems = load_samples(str(contrast.samples))
    assert not problems
    assert len(samples) == 64
    images, cache = fill_cache(folder, contrast.images, samples, encoder)
    assert {bool(cache.get(image.image_key).grid) for image in images.values()} == {True, False}
    return Work(models, samples, images, cache, encoder)


def write_chat_model(name, tiny, folder):
    """A language model of the tiny Llama's size, with its vocabulary, and the special tokens of another model."""
    published, config = PUBLISHED[name], CHAT_MODELS[name]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens(
        {"eos_token": published.tokens[0], "additional_special_tokens": list(published.tokens[1:])}
    )
    tokenizer.chat_template = published.template
    like = LlamaConfig.from_pretrained(tiny)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        setattr(config, key, getattr(like, key))
    config.vocab_size, config.layer_types = len(tokenizer), ["full_attention"] * like.num_hidden_layers
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("language_model", ["llama", *CHAT_MODELS])
def test_it_learns_what_only_the_image_tells_and_fails_when_images_are_swapped(work, tmp_path, language_model):
    llm, template = str(work.models.llm), "vicuna_v1"
    if language_model in CHAT_MODELS:
        llm, template = write_chat_model(language_model, work.models.llm, tmp_path / "llm"), "chat"

    model_uri = train_on(tmp_path, work, llm, template)

    answerer = Answerer(model_uri, device="cpu", dtype=torch.float32)
    questions = [
        Question(
            one.id, one, (last_answer(one.turns),), image_keys=tuple(work.images[name].image_key for name in one.images)
        )
        for one in work.samples
    ]
    assert len({question.text for question in questions}) == 1
    seen = score(answerer, questions, work.cache)
    swapped = score(answerer, questions, SwappedFeatures(work.cache))
    assert seen >= 0.95
    assert swapped <= 1 / NUM_ANSWERS + 0.2, "with the images exchanged only chance is left (three standard errors)"


def fill_cache(folder: Path, shown_images: Path, samples, encoder) -> tuple[dict[str, IndexedImage], FeatureCache]:
    identity = CacheIdentity(
        encoder_digest=encoder.weights_digest,
        encoder_dtype="float32",
        select_layer=-2,
        preprocessing=encoder.preprocessing,
        slicing={"max_slices": PIXELS.max_slices, "resolution": PIXELS.resolution, "patch_size": PIXELS.patch_size},
    )
    uri = create_cache(str(folder / "cache"), identity, "float16")
    images, rows = {}, []
    for name in sorted({name for sample in samples for name in sample.images}):
        data = (shown_images / name).read_bytes()
        sliced = slice_bytes(data, hashlib.sha256(data).hexdigest(), PIXELS)
        images[name] = IndexedImage(sliced.image_key, sliced.width, sliced.height, "")
        rows.append(encode_row(encode_sliced([sliced], encoder)[0], get_codec("float16")))
    write_feature_file(uri, rows)
    commit(uri)
    return images, FeatureCache.open(uri)


def train_on(folder: Path, work: Work, llm: str, template: str) -> str:
    _, samples, images, cache, encoder = work
    tokenizer = load_tokenizer(llm)
    settings = {key: value for key, value in PROJECTOR.items() if key != "name"}
    budget, visual_tokens = visual_token_budget("meteor", settings), find_visual_tokens(tokenizer)
    sample_set = SampleSet.of("contrast", samples)
    plan = plan_table(
        sample_set,
        tokenise_set(sample_set, tokenizer, template),
        IndexedImages.of(images),
        budget=budget,
        pixels=PIXELS,
        max_length=512,
    )
    table = plan.table

    def load_batch(rows):
        return collate(
            [[(table.tokens(i), [cache.get(key) for key in table.image_keys(i)]) for i in row] for row in rows],
            budget=budget,
            visual_tokens=visual_tokens,
            pad_id=tokenizer.pad_token_id,
            vision_width=encoder.width,
            select_layer=-2,
        )

    options = {
        "llm_path": llm,
        "vision_config": encoder.model.config,
        "projector": PROJECTOR,
        "select_layer": -2,
        "cache_identity": cache.identity.to_dict(),
        "dtype": torch.float32,
        "seed": 0,
        "image_token_id": visual_tokens.image_id,
    }
    model = build_model(**options)
    freeze_for(model, "finetune")
    recipe = Recipe(
        lr=2e-3,
        global_batch_size=16,
        micro_batch_size=16,
        epochs=40,
        warmup_ratio=0.05,
        seed=0,
        native_warmup=0.3,
        native_weight_full=0.2,
        aux_loss_coefficient=0.0,
        batching="padded",
        max_length=512,
        checkpoint_every_steps=None,
        checkpoint_every_s=1e9,
        keep_checkpoints=1,
    )
    engine = make_engine(
        model,
        zero_stage=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_grad_norm=1.0,
        empty_inputs=load_batch([]).as_inputs(),
    )
    checkpoints = str(folder / "checkpoints")
    losses: list[float] = []
    train(
        engine,
        StepPlan(table, recipe, "digest"),
        recipe,
        load_batches=lambda shares: (load_batch(share) for share in shares),
        checkpoints=checkpoints,
        start_step=0,
        on_step=lambda row: losses.append(row["loss"]),
    )
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.4f} in {len(losses)} steps")
    fresh = build_model(**options)
    freeze_for(fresh, "finetune")
    image_processor = MeteorImageProcessor(**vars(PIXELS), image_mean=encoder.mean, image_std=encoder.std)
    processor = MeteorProcessor(image_processor, tokenizer, PROJECTOR, template)
    export_model(
        fresh,
        Checkpoint(complete_checkpoints(checkpoints)[-1]),
        encoder,
        processor,
        str(folder / "model"),
        torch.float32,
    )
    return str(folder / "model")


class SwappedFeatures:
    """Gives another image's features under each key."""

    def __init__(self, cache: FeatureCache) -> None:
        keys = cache.keys()
        others = random.Random(0).sample(keys, len(keys))
        self._cache, self._other = cache, dict(zip(keys, others, strict=True))

    def get(self, image_key: str):
        return self._cache.get(self._other[image_key])

    def prefetch(self, keys, **limits):
        return self._cache.prefetch((self._other[key] for key in keys), **limits)


def score(answerer: Answerer, questions: list[Question], source) -> float:
    answers = answerer.answer(questions, source, max_new_tokens=8)
    right = sum(exact_match(answer, question.answer) for answer, question in zip(answers, questions, strict=True))
    print(f"{type(source).__name__}: {right / len(questions):.0%} right")
    return right / len(questions)
