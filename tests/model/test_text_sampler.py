"""The text-guided sampler: against a slow forward pass of one sample at a time, in packed rows, in training and in answers."""

import math

import pytest
import torch
from transformers import DynamicCache, MistralConfig

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.errors import DataError, SettingsError
from meteor.model import MeteorForConditionalGeneration
from meteor.model.attention import IMPLEMENTATIONS
from meteor.model.text_sampler import TextSampler, TokenGroups, choose_kept
from meteor.text.tokens import TokenisedSample
from meteor.train.build import checkpoint_activations, compile_layers

V, X = IMAGE_PLACE, IGNORE_INDEX
LAYERS, LAYER, KEEP = 4, 1, 0.5
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
ROWS = [[0, 2, 1], [3], [4, 1]]


def make_sample(ids, turns, num_answer_tokens):
    labels = [X] * (len(ids) - num_answer_tokens) + ids[len(ids) - num_answer_tokens :]
    return TokenisedSample(ids, labels, turns)


@pytest.fixture
def samples(make_features):
    """A sliced image; no image; two turns with an image each; two images in a turn; a turn that says nothing."""
    return [
        (make_sample([1, V, 10, 11, 5, 12, 2], [0, 1, 1, 1, 0, 0, 0], 2), [make_features("a", sliced=True, seed=1)]),
        (make_sample([1, 20, 21, 22, 2], [0] * 5, 2), []),
        (
            make_sample([1, V, 30, 5, 31, 2, V, 32, 33, 5, 34, 2], [0, 1, 1, 0, 0, 0, 2, 2, 2, 0, 0, 0], 2),
            [make_features("b", seed=2), make_features("c", sliced=True, seed=3)],
        ),
        (
            make_sample([1, V, 4, V, 40, 41, 5, 42, 2], [0, 1, 0, 1, 1, 1, 0, 0, 0], 2),
            [make_features("d", sliced=True, seed=4), make_features("e", seed=5)],
        ),
        (make_sample([1, V, 5, 50, 2], [0, 1, 0, 0, 0], 2), [make_features("f", seed=6)]),
    ]


@pytest.fixture
def make_pair(make_model):
    """A model with a sampler, and the same weights without one."""

    def make(attention="sdpa", **text):
        text = {"num_hidden_layers": LAYERS, "num_key_value_heads": 2, **text}
        sampled, plain = (make_model(text_sampler=one, **text) for one in ({"layer": LAYER, "keep": KEEP}, None))
        plain.load_state_dict(sampled.state_dict())
        sampled.language_model.set_attn_implementation(attention)
        plain.language_model.set_attn_implementation("eager")
        return sampled, plain

    return make


def slow_logits(plain, batch):
    """One sample, a row without padding: layer by layer, the deciding one's attention read off its weights."""
    embeds, attended, _ = plain.embed(
        batch.input_ids, batch.attention_mask, batch.num_slots, batch.features, batch.cls_attention, batch.grids
    )
    assert attended.all()
    decoder, length = plain.language_model.base_model, embeds.shape[1]
    turns, shown_images = batch.turns[0].tolist(), batch.image_numbers[0].tolist()
    places, hidden, maps = list(range(length)), embeds, []
    for number, layer in enumerate(decoder.layers):
        position = torch.tensor([places])
        mask = (
            torch.full((len(places), len(places)), torch.finfo(hidden.dtype).min).triu(1)[None, None].to(hidden.dtype)
        )
        rotary = decoder.rotary_emb(hidden, position_ids=position)
        normed = layer.input_layernorm(hidden)
        _, weights = layer.self_attn(normed, attention_mask=mask, position_embeddings=rotary)
        maps.append(weights[0].mean(dim=0))
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=position)
        if number == LAYER:
            dropped = set()
            for shown in sorted(set(shown_images) - {0}):
                tokens = [i for i in range(length) if shown_images[i] == shown]
                words = [i for i in range(length) if turns[i] == turns[tokens[0]] and not shown_images[i]]
                if words:
                    score = {i: maps[-1][words, i].mean().item() for i in tokens}
                    ranked = sorted(tokens, key=lambda i, score=score: (-score[i], i))
                    dropped |= set(ranked[math.ceil(KEEP * len(tokens)) :])
            places = [i for i in places if i not in dropped]
            hidden = hidden[:, places]
    return plain.language_model.lm_head(decoder.norm(hidden))[0], places


def spans_of(batch, row):
    numbers = batch.attention_mask[row]
    return [(numbers == number).nonzero().squeeze(-1) for number in range(1, int(numbers.max()) + 1)]


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
@torch.no_grad()
def test_packed_rows_give_what_a_slow_pass_over_each_sample_gives(
    make_pair, make_batch, samples, attention, checkpointing
):
    sampled, plain = make_pair(attention)
    if checkpointing:
        checkpoint_activations(sampled)
    batch = make_batch(samples, rows=ROWS)
    got = sampled(**{**batch.as_inputs(), "labels": None}).logits
    num_dropped = 0
    for row, numbers in enumerate(ROWS):
        for span, number in zip(spans_of(batch, row), numbers, strict=True):
            expected, places = slow_logits(plain, make_batch([samples[number]]))
            torch.testing.assert_close(got[row, span[places]], expected, **TOLERANCE)
            num_dropped += len(span) - len(places)
    # 4 of each sub-image are kept, of every image with words half: 6 of 12, twice, and 2 of 4; sample 4's keeps all.
    assert num_dropped == (6) + (2 + 6) + (6 + 2)


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_later_layers_are_shorter(make_pair, make_batch, samples, attention):
    sampled, _ = make_pair(attention)
    batch, lengths = make_batch(samples), []
    for layer in sampled.language_model.base_model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    sampled(**batch.as_inputs())
    assert lengths[: LAYER + 1] == [lengths[0]] * (LAYER + 1)
    assert lengths[LAYER + 1 :] == [lengths[-1]] * (LAYERS - LAYER - 1)
    assert lengths[-1] < lengths[0]


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_loss_and_gradients_are_the_same_packed_alone_and_with_recomputed_activations(
    make_pair, make_batch, samples, attention
):
    results = []
    for rows, checkpointing in ((ROWS, False), (ROWS, True), ([[one] for row in ROWS for one in row], False)):
        sampled, _ = make_pair(attention)
        if checkpointing:
            checkpoint_activations(sampled)
        loss = sampled(**make_batch(samples, rows=rows).as_inputs()).loss
        loss.backward()
        grads = torch.cat([one.grad.flatten() for one in sampled.parameters() if one.grad is not None])
        results.append((loss.detach(), grads))
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads, results[0][1], rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_what_a_later_turn_says_changes_nothing_that_an_earlier_one_sees(make_pair, make_batch, samples):
    sampled, _ = make_pair()
    batch = make_batch([samples[2]])
    inputs = {**batch.as_inputs(), "labels": None}
    before, kept = sampled(**inputs).logits, sampled.text_sampler.kept
    changed = batch.input_ids.clone()
    changed[batch.input_ids == 33] = 60
    after = sampled(**{**inputs, "input_ids": changed}).logits
    first_turn = int((batch.image_numbers[0] == 2).nonzero()[0])
    assert torch.equal(before[0, :first_turn], after[0, :first_turn])
    assert torch.equal(kept[0, :first_turn], sampled.text_sampler.kept[0, :first_turn])


def prompts(samples):
    """Questions of different lengths, their images sliced and not."""
    chosen = []
    for sample, images in (samples[0], samples[3], samples[1]):
        count = len(sample.input_ids) - 2
        ids = TokenisedSample(sample.input_ids[:count], [X] * count, sample.turns[:count])
        chosen.append((ids, images))
    return chosen


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("which", [[0, 1, 2], [0], [2]])
def test_answers_with_a_cache_are_those_of_recomputing_everything(make_pair, make_batch, samples, attention, which):
    sampled, _ = make_pair(attention)
    chosen = [prompts(samples)[i] for i in which]
    batch = make_batch(chosen, padding_side="left")
    answer = sampled.generate(**batch.as_inputs(), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    answer = answer[:, batch.input_ids.shape[1] :]
    for row, (sample, images) in enumerate(chosen):
        ids, turns = list(sample.input_ids), list(sample.turns)
        for step in range(6):
            one = make_batch([(TokenisedSample(ids, [X] * len(ids), turns), images)])
            with torch.no_grad():
                logits = sampled(**{**one.as_inputs(), "labels": None}).logits[0, -1]
            assert int(logits.argmax()) == int(answer[row, step])
            ids, turns = [*ids, int(answer[row, step])], [*turns, 0]


@torch.no_grad()
def test_the_cache_of_later_layers_holds_what_is_left(make_pair, make_batch, samples):
    sampled, _ = make_pair()
    batch, cache = make_batch([prompts(samples)[0]], padding_side="left"), DynamicCache()
    sampled.generate(**batch.as_inputs(), max_new_tokens=3, min_new_tokens=3, past_key_values=cache, pad_token_id=0)
    lengths = [cache.get_seq_length(layer) for layer in range(LAYERS)]
    # 12 visual tokens, of which 6 are dropped; the last new token is in no cache.
    length = batch.input_ids.shape[1] + 2
    assert lengths == [length] * (LAYER + 1) + [length - 6] * (LAYERS - LAYER - 1)


def test_after_answers_the_language_model_by_itself_is_untouched(make_pair, make_batch, samples):
    sampled, plain = make_pair()
    sampled.generate(
        **make_batch([prompts(samples)[0]], padding_side="left").as_inputs(), max_new_tokens=2, pad_token_id=0
    )
    ids = torch.tensor([[1, 7, 8, 9]])
    torch.testing.assert_close(sampled.language_model(ids).logits, plain.language_model(ids).logits, **TOLERANCE)


def test_keeping_everything_changes_nothing(make_model, make_batch, samples):
    text = {"num_hidden_layers": LAYERS}
    sampled, plain = (make_model(text_sampler=one, **text) for one in ({"layer": LAYER, "keep": 1.0}, None))
    plain.load_state_dict(sampled.state_dict())
    inputs = make_batch(samples, rows=ROWS).as_inputs()
    torch.testing.assert_close(sampled(**inputs).loss, plain(**inputs).loss, **TOLERANCE)


def test_the_highest_of_each_image_are_kept_and_ties_go_to_the_earlier():
    sample = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0, 2]])
    shown = torch.tensor([[0, 7, 7, 7, 9, 9, 9, 9, 0]])
    score = torch.tensor([[0, 0.1, 0.3, 0.3, torch.nan, torch.nan, torch.nan, torch.nan, 0]])
    groups = TokenGroups(sample, torch.zeros_like(sample), shown)
    assert choose_kept(score, groups, 0.34).tolist() == [[True, False, True, True, True, True, True, False, True]]
    assert choose_kept(score, groups, 0.3).tolist() == [[True, False, True, False, True, True, True, False, True]]


def test_numbers_differ_between_samples_of_a_batch():
    sample = torch.tensor([[1, 1, 2], [1, 1, 0]])
    turns, shown_images = torch.tensor([[1, 2, 1], [1, 1, 1]]), torch.tensor([[1, 0, 1], [2, 2, 2]])
    groups = TokenGroups.of(sample, turns, shown_images)
    for numbers in (groups.sample, groups.turn, groups.image):
        assert numbers[1, 2] == 0
    assert len(set(groups.sample.flatten().tolist())) == 4
    assert (
        len({groups.turn[0, 0].item(), groups.turn[0, 1].item(), groups.turn[0, 2].item(), groups.turn[1, 0].item()})
        == 4
    )
    assert groups.turn[1, 0] == groups.turn[1, 1]
    assert len({groups.image[0, 0].item(), groups.image[0, 2].item(), groups.image[1, 0].item(), 0}) == 4


def test_it_is_saved_with_the_model(make_pair, tmp_path, make_batch, samples):
    sampled, _ = make_pair()
    sampled.save_pretrained(tmp_path)
    loaded = MeteorForConditionalGeneration.from_pretrained(tmp_path, vision_tower=False)
    inputs = make_batch(samples).as_inputs()
    torch.testing.assert_close(loaded(**inputs).loss, sampled(**inputs).loss)
    assert (loaded.text_sampler.layer, loaded.text_sampler.keep) == (LAYER, KEEP)


def test_other_models_of_llamas_parts_have_it_and_others_are_refused(make_model, make_batch, samples):
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    ).to_dict()
    mistral = make_model(text_sampler={"layer": 1, "keep": 0.5}, **config)
    mistral(**make_batch(samples).as_inputs())
    assert not mistral.text_sampler.kept.all()
    with pytest.raises(SettingsError, match="built like Llama"):
        TextSampler(make_model(model_type="gpt2").language_model, layer=0, keep=0.5)


@pytest.mark.parametrize("layer", [-1, LAYERS - 1, 40])
def test_a_layer_with_none_after_it_is_refused(make_model, layer):
    with pytest.raises(SettingsError, match=rf"layer={layer}"):
        make_model(text_sampler={"layer": layer, "keep": 0.5}, num_hidden_layers=LAYERS)


def test_what_it_cannot_do_is_said(make_pair, make_batch, samples):
    sampled, _ = make_pair()
    inputs = make_batch([prompts(samples)[0]], padding_side="left").as_inputs()
    with pytest.raises(SettingsError, match="num_beams"):
        sampled.generate(**inputs, num_beams=2)
    with pytest.raises(DataError, match="turns and image_numbers"):
        sampled(**{**inputs, "turns": None})
    with pytest.raises(SettingsError, match="exclude each other"):
        compile_layers(sampled, zero_stage=0)


def test_a_sample_longer_than_the_model_s_window_is_refused(make_pair, make_batch, samples):
    sampled, _ = make_pair()
    sampled.language_model.config.sliding_window = 8
    with pytest.raises(SettingsError, match="attends within 8: lower max_length"):
        sampled(**make_batch(samples).as_inputs())
