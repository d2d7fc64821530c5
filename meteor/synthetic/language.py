"""Training of the tiny Llama on the generator's language, because stage 1 expects a model that knows words, like Vicuna."""

import time
from collections.abc import Callable
from itertools import islice

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from meteor.synthetic.questions import PairDealer, ask, ask_without_image
from meteor.synthetic.scenes import SceneDealer
from meteor.synthetic.streams import random_stream
from meteor.text.conversation import Conversation, Turn
from meteor.text.tokens import TokenisedSample, tokenise

_NUM_SCENES = 300
_BATCH_SIZE = 32
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 20
_STEPS_PER_REPORT = 50


def train_language(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    num_steps: int,
    report: Callable[[str], None],
) -> float | None:
    """Train on captions and dialogues without images: the model learns the form of answers, not which is right.

    Args:
        model: the tiny Llama, trained in place.
        tokenizer: tokenizer of the model.
        seed: seed of texts and batches.
        num_steps: number of optimiser steps.
        report: callback for lines of progress.

    Returns:
        Mean loss of the last ten steps, in nats per token; None without steps.
    """
    samples = language_samples(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    started, losses = time.monotonic(), []
    for step in range(num_steps):
        chosen = torch.randint(len(samples), (_BATCH_SIZE,), generator=generator)
        loss = _loss(model, [samples[int(i)] for i in chosen], tokenizer.pad_token_id)
        loss.backward()
        remaining = min(1.0, (step + 1) / _WARMUP_STEPS) * (1 - step / num_steps)
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * remaining
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % _STEPS_PER_REPORT == 0 or step + 1 == num_steps:
            report(
                f"tiny Llama: step {step + 1}/{num_steps}, loss {loss.item():.3f}, {time.monotonic() - started:.1f} s"
            )
    model.eval()
    last = losses[-10:]
    return sum(last) / len(last) if last else None


def language_samples(tokenizer: PreTrainedTokenizerBase, seed: int) -> list[TokenisedSample]:
    """Tokenise dialogues and captions of new scenes as the stages do, without the images."""
    rng = random_stream(seed, "language")
    scenes = list(islice(SceneDealer(rng), _NUM_SCENES))
    questions = [question for scene in scenes for question in ask(scene, rng)]
    questions += [question for _, _, question in islice(PairDealer(scenes, rng), _NUM_SCENES // 2)]
    questions += [ask_without_image(rng) for _ in range(_NUM_SCENES // 2)]
    dialogues = [
        tokenise(Conversation((Turn("human", question.text), Turn("gpt", question.answer))), tokenizer, "vicuna_v1")
        for question in questions
    ]
    captions = [tokenise(_captioned(scene.caption), tokenizer, "plain") for scene in scenes]
    return dialogues + [TokenisedSample([i for i in caption.input_ids if i >= 0], []) for caption in captions]


def _captioned(caption: str) -> Conversation:
    return Conversation((Turn("human", "", num_images=1), Turn("gpt", caption)))


def _loss(model: LlamaForCausalLM, samples: list[TokenisedSample], pad_id: int) -> torch.Tensor:
    length = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), length), pad_id)
    attention_mask = torch.zeros(len(samples), length, dtype=torch.long)
    for i, sample in enumerate(samples):
        input_ids[i, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        attention_mask[i, : len(sample.input_ids)] = 1
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    targets = input_ids.masked_fill(attention_mask == 0, -100)[:, 1:]
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
