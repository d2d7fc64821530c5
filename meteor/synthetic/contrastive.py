"""Training of a tiny CLIP on generated views and their captions, in under a minute on one core.

Letters: B views of a batch, D projection width.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from meteor.constants import CLIP_MEAN, CLIP_STD
from meteor.image.transform import normalise
from meteor.synthetic.captions import MAX_CAPTION_TOKENS, make_caption_tokenizer
from meteor.synthetic.streams import random_stream
from meteor.synthetic.views import PATCH_GRIDS, PATCH_SIZE, Views, make_views

IMAGE_SIZE = 112
HELD_OUT_PER_GRID = 64
_WIDTH = 64
_NUM_HEADS = 4
# The selection reads the attention of the last block but one. With four blocks earlier blocks sometimes did the looking:
# its attention inside boxes was 1.6 to 2.7 times chance in six runs. With three blocks it was 2.1 to 2.6 times in four
# runs, and steps are faster.
_NUM_VISION_BLOCKS = 3
_NUM_TEXT_BLOCKS = 2
_BATCH_SIZE = 64
_MAX_VIEWS_PER_GRID = 400
# The initial weights of transformers are kept: with weights twice as large the loss was equal, but the class token's
# attention inside boxes fell to 1.2 times chance.
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.05
_WARMUP_SHARE = 0.1
_MAX_LOGIT_SCALE = 100.0
_STEPS_PER_REPORT = 50
_STEPS_IN_FINAL_LOSS = 10


@dataclass(frozen=True)
class TrainedClip:
    """Trained pair of towers and its quality.

    Attributes:
        model: the model in evaluation mode.
        tokenizer: tokenizer of captions.
        final_loss: mean InfoNCE loss of the last ten steps in nats (chance is ln 64 = 4.16); None without steps.
        retrieval_accuracy: share of views whose own caption is the nearest among 64 held-out captions, 0 to 1, mean over
            patch grids.
    """

    model: CLIPModel
    tokenizer: PreTrainedTokenizerFast
    final_loss: float | None
    retrieval_accuracy: float


def train_clip(*, seed: int, num_steps: int, report: Callable[[str], None]) -> TrainedClip:
    """Train a CLIP from scratch (InfoNCE over the batch, views to captions and captions to views).

    Each batch holds one patch grid, so that the position table is trained in the interpolated form in which it is used. The
    result depends only on the arguments and on torch's number of threads. torch's global generator is not changed.

    Args:
        seed: seed of weights, views and batches.
        num_steps: number of optimiser steps.
        report: callback for lines of progress.
    """
    tokenizer = make_caption_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(clip_config(tokenizer))
    num_views = min(_MAX_VIEWS_PER_GRID, max(_BATCH_SIZE, math.ceil(num_steps * _BATCH_SIZE / len(PATCH_GRIDS))))
    pools = [make_views(grid, num_views, seed, "train") for grid in PATCH_GRIDS] if num_steps else []
    losses = _train(model, tokenizer, pools, seed=seed, num_steps=num_steps, report=report)
    model.eval()
    final_loss = float(np.mean(losses[-_STEPS_IN_FINAL_LOSS:])) if losses else None
    held_out = [make_views(grid, HELD_OUT_PER_GRID, seed, "held-out") for grid in PATCH_GRIDS]
    return TrainedClip(model, tokenizer, final_loss, retrieval_accuracy(model, tokenizer, held_out))


def clip_config(tokenizer: PreTrainedTokenizerFast) -> CLIPConfig:
    """Return the configuration of a CLIP with 0.19 M parameters in its vision tower."""
    towers = {"hidden_size": _WIDTH, "intermediate_size": 4 * _WIDTH, "num_attention_heads": _NUM_HEADS}
    text = {
        "num_hidden_layers": _NUM_TEXT_BLOCKS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_CAPTION_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"num_hidden_layers": _NUM_VISION_BLOCKS, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    projection: dict[str, Any] = {"projection_dim": _WIDTH}
    return CLIPConfig(
        text_config={**towers, **text, **projection}, vision_config={**towers, **vision, **projection}, **projection
    )


def _train(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    pools: list[Views],
    *,
    seed: int,
    num_steps: int,
    report: Callable[[str], None],
) -> list[float]:
    rng = random_stream(seed, "batches")
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, betas=(0.9, 0.98))
    losses: list[float] = []
    started = time.monotonic()
    for step in range(num_steps):
        views = pools[rng.integers(len(pools))]
        chosen = rng.permutation(len(views.scenes))[:_BATCH_SIZE]
        logits_BB = similarities(model, tokenizer, views, chosen)
        loss = info_nce(logits_BB)
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * _schedule(step / num_steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % _STEPS_PER_REPORT == 0 or step + 1 == num_steps:
            seconds = time.monotonic() - started
            report(f"tiny CLIP: step {step + 1}/{num_steps}, loss {losses[-1]:.3f}, {seconds:.1f} s")
    return losses


def _schedule(done: float) -> float:
    """Return the factor of the learning rate: linear warm-up, then a cosine to zero."""
    if done < _WARMUP_SHARE:
        return (done + 0.01) / (_WARMUP_SHARE + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - _WARMUP_SHARE) / (1 - _WARMUP_SHARE)))


def similarities(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, views: Views, chosen: np.ndarray
) -> torch.Tensor:
    """Return the scaled cosines between chosen views (rows) and their captions (columns), (B, B)."""
    captions = [views.scenes[index].caption for index in chosen]
    words = tokenizer(captions, padding=True, return_tensors="pt")
    pixels_B3HW = torch.stack([normalise(pixels_HW3, CLIP_MEAN, CLIP_STD) for pixels_HW3 in views.pixels[chosen]])
    seen = model.vision_model(pixel_values=pixels_B3HW, interpolate_pos_encoding=True)
    read = model.text_model(input_ids=words["input_ids"], attention_mask=words["attention_mask"])
    view_BD = functional.normalize(model.visual_projection(seen.pooler_output), dim=-1)
    caption_BD = functional.normalize(model.text_projection(read.pooler_output), dim=-1)
    return model.logit_scale.exp().clamp(max=_MAX_LOGIT_SCALE) * view_BD @ caption_BD.T


def info_nce(logits_BB: torch.Tensor) -> torch.Tensor:
    """Return CLIP's loss: cross-entropy towards the diagonal, mean over rows and columns."""
    labels_B = torch.arange(len(logits_BB))
    return (functional.cross_entropy(logits_BB, labels_B) + functional.cross_entropy(logits_BB.T, labels_B)) / 2


@torch.inference_mode()
def retrieval_accuracy(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, groups: list[Views]) -> float:
    """Return the share of views whose own caption is the nearest of their group; chance is 1 / group size."""
    accuracies = []
    for views in groups:
        nearest_B = similarities(model, tokenizer, views, np.arange(len(views.scenes))).argmax(dim=1)
        accuracies.append(float((nearest_B == torch.arange(len(nearest_B))).float().mean()))
    return float(np.mean(accuracies))
