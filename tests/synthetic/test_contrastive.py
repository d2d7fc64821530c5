"""Contrastive training: the loss by hand, captions as CLIP reads them, the same weights twice."""

import math

import pytest
import torch

from meteor.synthetic.captions import MAX_CAPTION_TOKENS, make_caption_tokenizer
from meteor.synthetic.contrastive import info_nce, train_clip
from meteor.synthetic.scenes import Scene, SceneObject
from meteor.synthetic.vocabulary import MAX_COUNT


def test_the_loss_is_the_mean_over_rows_and_columns() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    rows = (math.log(4) + math.log(2)) / 2
    columns = (math.log(2) + math.log(4)) / 2
    assert info_nce(logits).item() == pytest.approx((rows + columns) / 2)
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(7.0), 0.0]])
    rows, columns = (math.log(4) + math.log(8)) / 2, (math.log(8) + math.log(4)) / 2
    assert info_nce(logits).item() == pytest.approx((rows + columns) / 2)


def test_captions_end_with_the_highest_id_and_know_every_word(scenes: list[Scene]) -> None:
    tokenizer = make_caption_tokenizer()
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    for scene in scenes:
        ids = tokenizer(scene.caption).input_ids
        assert tokenizer.unk_token_id not in ids
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_the_longest_caption_fits() -> None:
    shape = SceneObject("circle", "red", (0, 0, 9, 9), "bottom right")
    text = SceneObject("text", "black", (20, 0, 29, 9), word="sun", font_px=14)
    caption = Scene(40, 30, (*[shape] * MAX_COUNT, text), 0).caption
    assert len(make_caption_tokenizer()(caption).input_ids) <= MAX_CAPTION_TOKENS


def test_training_twice_gives_the_same_weights_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    state = torch.get_rng_state()
    lines: list[str] = []
    first, again = (train_clip(seed=5, num_steps=1, report=lines.append) for _ in range(2))
    torch.set_num_threads(before)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.final_loss == again.final_loss
    weights = again.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.model.state_dict().items())
    assert len(lines) == 2
    assert lines[0].startswith("tiny CLIP: step 1/1, loss ")
