from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionModel

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.errors import DataError
from meteor.image.pixels import PixelSettings, slice_bytes
from meteor.image.transform import normalise
from meteor.model import MeteorConfig, MeteorForConditionalGeneration
from meteor.model.image_processing import pack_pixels
from meteor.projector import ProjectorOutput
from meteor.projector.statistics import sum_selection
from meteor.text.tokens import TokenisedSample
from meteor.train.build import freeze_for
from meteor.vision.encode_images import encode_sliced

V, X = IMAGE_PLACE, IGNORE_INDEX
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def make_samples(make_features):
    def make():
        """A sliced image, no image, two images; of different lengths."""
        return [
            (TokenisedSample([1, V, 10, 11, 12, 2], [X, X, X, 11, 12, 2]), [make_features("a", sliced=True, seed=1)]),
            (TokenisedSample([1, 20, 21, 22, 23, 24, 2], [X, X, X, X, X, 24, 2]), []),
            (
                TokenisedSample([1, V, 30, V, 31, 2], [X, X, X, X, 31, 2]),
                [make_features("b", seed=2), make_features("c", sliced=True, seed=3)],
            ),
        ]

    return make


class FakeProjector(nn.Module):
    """Three tokens a sub-image, of which the last ``num_unused`` are masked; what the unused ones hold is odd."""

    def __init__(self, num_unused, *, unused_value=1e3, aux_loss=None):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        tokens = torch.randn(len(num_unused), 3, 32, generator=generator)
        self.mask = torch.arange(3) < 3 - torch.tensor(num_unused)[:, None]
        self.tokens = torch.where(self.mask[..., None], tokens, unused_value)
        self.aux_loss = aux_loss

    def forward(self, features, cls_attention, grids, native_weight=None):
        return ProjectorOutput(tokens=self.tokens, mask=self.mask, aux_loss=self.aux_loss)


def visual_tokens(model, image, native_weight=None):
    """The kept tokens of each sub-image, each projected alone."""
    kept = []
    for features, attention, grid in zip(image.features, image.cls_attention, image.patch_grids, strict=True):
        output = model.projector(features[None], attention[:1], torch.tensor([grid]), native_weight)
        kept.append(output.tokens[0][output.mask[0]])
    return kept


def expected_embeddings(model, sample, images, native_weight=None):
    """(L, D) of one sample put together piece by piece: ids 3 and 4 are the separators of `make_batch`."""
    embedding = model.get_input_embeddings().weight
    images, rows = iter(images), []
    for token in sample.input_ids:
        if token != V:
            rows.append(embedding[token])
            continue
        image = next(images)
        for i, tokens in enumerate(visual_tokens(model, image, native_weight)):
            rows += list(tokens)
            if i:
                rows.append(embedding[4 if i % image.grid[0] == 0 else 3])
    return torch.stack(rows)


def logits_alone(model, embeddings):
    """(L, vocabulary) of one sample without padding, by the language model itself."""
    return model.language_model(inputs_embeds=embeddings[None], use_cache=False).logits[0]


@pytest.mark.parametrize("projector", [{"name": "meteor", "k": 4}, {"name": "mlp"}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_visual_tokens_land_in_their_slots_in_order(make_model, make_batch, make_samples, projector, side):
    model, samples = make_model(projector).eval(), make_samples()
    batch = make_batch(samples, projector, padding_side=side)
    inputs = batch.as_inputs()
    for name in ("labels", "turns", "image_numbers"):
        del inputs[name]
    with torch.no_grad():
        embeddings, mask, _ = model.embed(**inputs)
        logits = model(**inputs).logits
        for i, (sample, images) in enumerate(samples):
            expected = expected_embeddings(model, sample, images)
            assert int(mask[i].sum()) == len(expected)
            torch.testing.assert_close(embeddings[i][mask[i]], expected, **TOLERANCE)
            torch.testing.assert_close(logits[i][mask[i]], logits_alone(model, expected), **TOLERANCE)


def test_the_native_weight_reaches_the_selection(make_model, make_batch, make_samples):
    model, samples = make_model({"name": "meteor", "k": 2}).eval(), make_samples()
    batch = make_batch(samples[:1], {"name": "meteor", "k": 2})
    inputs = batch.as_inputs()
    for name in ("labels", "turns", "image_numbers"):
        del inputs[name]
    with torch.no_grad():
        for weight in (torch.tensor(0.0), torch.tensor(50.0)):
            embeddings, _, _ = model.embed(**inputs, native_weight=weight)
            torch.testing.assert_close(embeddings[0], expected_embeddings(model, *samples[0], weight), **TOLERANCE)
        visual, native = (model.embed(**inputs, native_weight=torch.tensor(w))[2].indices for w in (0.0, 50.0))
    assert not torch.equal(visual, native)


def test_the_loss_is_the_mean_cross_entropy_of_every_answer_token(make_model, make_batch, make_samples):
    model = make_model().eval()
    inputs = make_batch(make_samples()).as_inputs()
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs).logits
    terms = [
        -F.log_softmax(logits[i, position - 1].double(), dim=-1)[labels[i, position]]
        for i in range(labels.shape[0])
        for position in range(1, labels.shape[1])
        if labels[i, position] != X
    ]
    assert len(terms) == 3 + 2 + 2
    total = float(sum(terms))
    assert model(**inputs, labels=labels).loss.item() == pytest.approx(total / 7, rel=1e-5)
    for num_items in (20, torch.tensor(20)):
        assert model(**inputs, labels=labels, num_items_in_batch=num_items).loss.item() == pytest.approx(
            total / 20, rel=1e-5
        )


def test_the_projectors_own_loss_is_added_with_its_coefficient(make_model, make_batch, make_samples):
    model = make_model().eval()
    model.projector = FakeProjector([0, 0, 0], aux_loss=torch.tensor(5.0))
    batch = make_batch(make_samples()[:1], {"name": "meteor", "k": 3})
    plain = model(**batch.as_inputs()).loss.item()
    assert model(**batch.as_inputs(), aux_loss_coefficient=0.1).loss.item() == pytest.approx(plain + 0.5, rel=1e-5)


def test_a_pass_with_labels_sums_up_the_selection_of_the_real_sub_images(make_model, make_batch, make_samples):
    model, samples = make_model().eval(), make_samples()
    images = [image for _, images in samples for image in images]
    alone = []
    for image in images:
        for features, attention, grid in zip(image.features, image.cls_attention, image.patch_grids, strict=True):
            output = model.projector(features[None], attention[:1], torch.tensor([grid]))
            scores = (output.visual_scores, output.native_scores)
            alone.append(sum_selection(*scores, torch.ones(1, len(features), dtype=torch.bool), k=4))
    output = model(**make_batch(samples).as_inputs())
    assert not output.selection_sums.requires_grad
    torch.testing.assert_close(output.selection_sums, sum(alone))
    # 3 + 1 + 3 sub-images, all with more than 4 patches.
    assert (output.selection_sums[0], output.selection_sums[-1]) == (7, 7 * 4)


def test_the_stand_in_for_images_is_not_counted(make_model, make_batch, make_samples):
    batch = make_batch(make_samples()[1:2])
    assert batch.features.shape[0] == 1
    assert not make_model()(**batch.as_inputs()).selection_sums.any()


def test_a_projector_without_both_scores_has_nothing_to_sum(make_model, make_batch, make_samples):
    projector = {"name": "mlp"}
    assert make_model(projector)(**make_batch(make_samples(), projector).as_inputs()).selection_sums is None


def test_nothing_is_summed_up_without_labels(make_model, make_batch, make_samples, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("no statistics outside training")

    monkeypatch.setattr("meteor.model.modeling.sum_selection", refuse)
    model, inputs = make_model().eval(), make_batch(make_samples(), padding_side="left").as_inputs()
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    del inputs["labels"]
    model(**inputs)


def test_what_stands_at_padding_changes_nothing(make_model, make_batch, make_samples):
    model = make_model().eval()
    batch = make_batch(make_samples())
    real = torch.arange(batch.features.shape[1]) < batch.grids.prod(dim=1, keepdim=True)
    spoilt = replace(
        batch,
        input_ids=torch.where(batch.attention_mask > 0, batch.input_ids, 33),
        features=torch.where(real[..., None], batch.features, torch.nan),
        cls_attention=torch.where(real, batch.cls_attention, torch.nan),
    )
    assert not torch.equal(spoilt.input_ids, batch.input_ids)
    assert spoilt.features.isnan().any()
    with torch.no_grad():
        losses = [float(model(**one.as_inputs()).loss) for one in (batch, spoilt)]
        logits = [
            model(**{**one.as_inputs(), "labels": None}).logits[batch.attention_mask > 0] for one in (batch, spoilt)
        ]
    assert losses[0] == losses[1]
    assert torch.equal(*logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_unused_slots_are_neither_attended_nor_counted_as_positions(make_model, make_batch, make_samples, side):
    model, samples = make_model().eval(), make_samples()[:2]
    model.projector = FakeProjector([1, 2, 0])
    batch = make_batch(samples, {"name": "meteor", "k": 3}, padding_side=side)
    inputs = batch.as_inputs()
    for name in ("labels", "turns", "image_numbers"):
        del inputs[name]
    embedding = model.get_input_embeddings().weight
    tokens = model.projector.tokens
    text = embedding[torch.tensor([10, 11, 12, 2])]
    # The sequence as if the unused slots had never been: 2 + 1 + 3 visual tokens and the two separators.
    used = [embedding[1:2], tokens[0, :2], tokens[1, :1], embedding[3:4], tokens[2], embedding[4:5], text]
    with torch.no_grad():
        expected = logits_alone(model, torch.cat(used))
        _, mask, _ = model.embed(**inputs)
        logits = model(**inputs).logits[0][mask[0]]
        torch.testing.assert_close(logits, expected, **TOLERANCE)
        alone = greedy(model, torch.cat(used), 6)
        answers = model.generate(**inputs, max_new_tokens=6, do_sample=False) if side == "left" else None
    if answers is not None:
        assert answers[0].tolist() == batch.input_ids[0].tolist() + alone


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_batch_without_images_is_the_language_model_alone(make_model, make_batch, stage):
    model = make_model().eval()
    freeze_for(model, stage)
    ids, labels = [1, 20, 21, 22, 2], [X, X, X, 22, 2]
    batch = make_batch([(TokenisedSample(ids, labels), [])])
    output = model(**batch.as_inputs())
    expected = model.language_model(torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False).loss
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # Under ZeRO every rank takes part in every reduction: the projector has gradients, and they are zero.
    output.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())


def test_a_batch_laid_out_for_another_projector_is_refused(make_model, make_batch, make_samples):
    batch = make_batch(make_samples(), {"name": "meteor", "k": 5})
    with pytest.raises(DataError, match=r"35 visual slots, the projector gives 28 tokens"):
        make_model({"name": "meteor", "k": 4})(**batch.as_inputs())


def greedy(model, embeddings, num_tokens):
    """The slow truth: the whole sequence anew for each token."""
    answer = []
    for _ in range(num_tokens):
        answer.append(int(logits_alone(model, embeddings)[-1].argmax()))
        embeddings = torch.cat([embeddings, model.get_input_embeddings().weight[answer[-1:]]])
    return answer


def test_batched_greedy_answers_equal_those_found_one_by_one(make_model, make_batch, make_samples):
    model = make_model().eval()
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter *= 4  # freshly initialised weights give the same token everywhere
    samples = [(TokenisedSample(one.input_ids[:-1], one.labels[:-1]), images) for one, images in make_samples()]
    batch = make_batch(samples, padding_side="left")
    answers = model.generate(**batch.as_inputs(), max_new_tokens=8, do_sample=False)[
        :, batch.input_ids.shape[1] :
    ].tolist()
    with torch.no_grad():
        expected = [greedy(model, expected_embeddings(model, *sample), 8) for sample in samples]
    assert answers == expected
    assert len({tuple(answer) for answer in answers}) == 3


@pytest.mark.parametrize("text", [{}, {"tie_word_embeddings": True}, {"model_type": "qwen2", "num_key_value_heads": 4}])
def test_a_saved_model_loads_with_every_weight_through_the_auto_classes(
    make_model, make_batch, make_samples, tmp_path, text
):
    model = make_model(vision_tower=True, **text).eval()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MeteorConfig)
    assert (config.projector, config.cache_identity) == (model.config.projector, model.config.cache_identity)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, MeteorForConditionalGeneration)
    assert not any(info.values())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    inputs = {**make_batch(make_samples()).as_inputs(), "labels": None}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("text", [{}, {"tie_word_embeddings": True}, {"model_type": "phi"}])
def test_new_rows_of_the_embedding_change_no_greedy_answer(make_model, make_batch, make_samples, tmp_path, text):
    model = make_model(**text).eval()
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter *= 4
    samples = [(TokenisedSample(one.input_ids[:-1], one.labels[:-1]), images) for one, images in make_samples()]
    inputs = make_batch(samples, padding_side="left").as_inputs()
    options = {"max_new_tokens": 8, "do_sample": False}
    before, logits = model.generate(**inputs, **options), model(**{**inputs, "labels": None}).logits
    model.grow_vocabulary(64)
    assert model.config.get_text_config().vocab_size == 64
    model.grow_vocabulary(66)
    assert model.config.get_text_config().vocab_size == 128
    assert torch.equal(model.generate(**inputs, **options), before)
    grown = model(**{**inputs, "labels": None}).logits
    torch.testing.assert_close(grown[..., :64], logits, **TOLERANCE)
    torch.testing.assert_close(grown[..., 64:], logits.mean(-1, keepdim=True).expand_as(logits), **TOLERANCE)
    model.save_pretrained(tmp_path)
    loaded = MeteorForConditionalGeneration.from_pretrained(tmp_path, vision_tower=False).eval()
    assert torch.equal(loaded(**{**inputs, "labels": None}).logits, grown)


def test_the_loss_beside_logits_is_the_loss_without(make_model, make_batch, make_samples):
    model = make_model()
    inputs = make_batch(make_samples(), rows=[[0, 1], [2]]).as_inputs()
    with_logits, without = model(**inputs), model(**inputs, skip_logits=True)
    torch.testing.assert_close(with_logits.loss, without.loss, **TOLERANCE)
    assert with_logits.logits.shape == (*inputs["input_ids"].shape, 64)
    assert without.logits is None
    # Hugging Face's trainers copy all token ids into the labels and mask the padding alone.
    copied = {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, X)}
    slots = copied["labels"] == 32000
    masked = {**copied, "labels": copied["labels"].masked_fill(slots, X)}
    assert slots.any()
    assert torch.equal(model(**copied).loss, model(**masked).loss)


def test_the_type_asked_for_wins_over_the_language_models_own(make_model, tmp_path):
    make_model(dtype="float16").save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = MeteorForConditionalGeneration.from_pretrained(tmp_path, vision_tower=False, dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


@pytest.fixture
def image_inputs(make_batch, make_image, png):
    """The same two images for the features path and for the pixels path."""

    def make(model):
        clip = model.frozen_encoder()
        files = [png(make_image(*size, seed=i)) for i, size in enumerate([(112, 56), (56, 70)])]
        sliced = [slice_bytes(data, "key", PixelSettings(resolution=56)) for data in files]
        samples = [
            (TokenisedSample([1, V, 10 + i, 2], [X, X, 10 + i, 2]), [features])
            for i, features in enumerate(encode_sliced(sliced, clip))
        ]
        inputs = make_batch(samples).as_inputs()
        pixels = [normalise(sub_image, clip.mean, clip.std) for one in sliced for sub_image in one.sub_images]
        others = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels", "num_slots")}
        return inputs, {**others, "pixel_values": pack_pixels(pixels, clip.patch_size), "grids": inputs["grids"]}

    return make


def test_pixels_give_what_their_features_give(make_model, image_inputs, tmp_path):
    make_model(vision_tower=True).save_pretrained(tmp_path)
    model = MeteorForConditionalGeneration.from_pretrained(tmp_path)
    by_features, by_pixels = image_inputs(model)
    with torch.no_grad():
        seen, cached = (model(**inputs) for inputs in (by_pixels, by_features))
    torch.testing.assert_close(seen.logits, cached.logits, **TOLERANCE)
    torch.testing.assert_close(seen.selection_sums, cached.selection_sums, **TOLERANCE)


def test_the_towers_encoder_normalises_and_is_named_as_the_cache_says(make_model):
    clip = make_model(vision_tower=True).frozen_encoder()
    assert (clip.mean, clip.std, clip.weights_digest) == ((0.5,) * 3, (0.5,) * 3, "0" * 64)
    assert (clip.select_layer, clip.attention_layers) == (-2, (-2,))
    assert isinstance(clip.model, CLIPVisionModel)


def test_a_model_may_be_loaded_without_its_tower(make_model, make_batch, make_samples, tmp_path):
    model = make_model(vision_tower=True).eval()
    model.save_pretrained(tmp_path)
    loaded, info = MeteorForConditionalGeneration.from_pretrained(
        tmp_path, vision_tower=False, output_loading_info=True
    )
    assert not info["missing_keys"]
    inputs = {**make_batch(make_samples()).as_inputs(), "labels": None}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    with pytest.raises(DataError, match="without its vision tower"):
        loaded.encode(torch.zeros(1, 3, 28, 28))
