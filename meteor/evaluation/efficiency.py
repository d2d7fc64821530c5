"""Measured cost of answers: encoder, projector, the prompt's pass and the tokens after it, and memory (paper, Table 4)."""

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from transformers.generation.streamers import BaseStreamer

from meteor.data.collate import Batch
from meteor.evaluation.answer import Answerer
from meteor.evaluation.questions import Question
from meteor.features import FeatureSource
from meteor.image.pixels import SlicedImage
from meteor.model.flops import AnswerFlops
from meteor.projector.answering import AS_TRAINED, AnswerSelection
from meteor.projector.flops import count_projector_flops
from meteor.vision.encode_images import load_pixels
from meteor.vision.encoder import FrozenEncoder
from meteor.vision.flops import EncoderShape


@dataclass(frozen=True)
class Efficiency:
    """Measurements of a model that answers one question after the other.

    Attributes:
        hardware: device, number of threads on a CPU, and torch's version; compare only measurements on equal hardware.
        num_questions: questions per round.
        num_new_tokens: tokens per answer.
        encoder_s: seconds per question for the vision tower's pass over all sub-images, without reading and slicing of the
            images; like all times the median over rounds.
        projector_s: seconds per question for the projector.
        prefill_s: seconds per question from features to the first token: the projector, then the language model over the
            prompt.
        tokens_per_s: speed of the answers after their first token; the median over rounds.
        encoder_flops, projector_flops: FLOPs per question of the two parts.
        prefill_flops: FLOPs per question of the language model over the prompt, without the projector.
        token_flops: mean FLOPs of each later token.
        memory_bytes: peak of the memory that torch allocated on the GPU, or of the process's memory on a CPU.
        num_prompt_tokens: mean number of prompt tokens per question, including visual tokens.
        num_visual_tokens: mean number of visual tokens per question, without slots that the projector leaves unused.
        used_share: share of the visual slots that hold a token; 1 except for adaptive projectors.
    """

    hardware: str
    num_questions: int
    num_new_tokens: int
    encoder_s: float
    projector_s: float
    prefill_s: float
    tokens_per_s: float
    encoder_flops: float
    projector_flops: float
    prefill_flops: float
    token_flops: float
    memory_bytes: int
    num_prompt_tokens: float
    num_visual_tokens: float
    used_share: float


def measure_answers(
    answerer: Answerer,
    questions: Sequence[Question],
    source: FeatureSource,
    images: Mapping[str, SlicedImage],
    *,
    new_tokens: int = 32,
    rounds: int = 3,
    selection: AnswerSelection = AS_TRAINED,
) -> Efficiency:
    """Answer each question alone with exactly ``new_tokens`` tokens, in several rounds, and measure the cost.

    Args:
        answerer: the model; no other work should run on its device.
        questions: questions, which must be equal for all models that are compared.
        source: source of the images' features; reading them is not timed.
        images: image key -> sliced image, for the encoder.
        new_tokens: tokens per answer, at least 2.
        rounds: number of timed rounds, which follow an untimed one.
        selection: changes of the token selection.
    """
    assert new_tokens > 1, "speed is measured after the first token"
    answerer.choose(selection)
    batches = [answerer.batch([question], source, selection=selection) for question in questions]
    encoder = answerer.model.frozen_encoder()
    pixels = [load_pixels(_shown(answerer, question, images, selection), encoder) for question in questions]
    if answerer.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds: list[tuple[float, ...]] = []
    for _ in range(rounds + 1):
        parts = (
            _seconds(answerer.device, lambda: [encoder.encode(parts) for parts in pixels]),
            _seconds(answerer.device, lambda: [_project(answerer, batch) for batch in batches]),
        )
        seconds.append((*parts, *_timed(answerer, batches, new_tokens)))
    # The first round loads kernels and fills caches.
    encoder_s, projector_s, prefill_s, decode_s = map(median, zip(*seconds[1:], strict=True))
    num_slots = sum(batch.num_visual_tokens for batch in batches)
    num_used = sum(_count_used(answerer, batch) for batch in batches)
    generated = len(batches) * (new_tokens - 1)
    flops = _count_flops(answerer, batches, pixels, encoder, new_tokens)
    return Efficiency(
        hardware=describe_hardware(answerer.device),
        num_questions=len(batches),
        num_new_tokens=new_tokens,
        encoder_s=encoder_s / len(batches),
        projector_s=projector_s / len(batches),
        prefill_s=prefill_s / len(batches),
        tokens_per_s=generated / decode_s,
        encoder_flops=flops[0] / len(batches),
        projector_flops=flops[1] / len(batches),
        prefill_flops=flops[2] / len(batches),
        token_flops=flops[3] / generated,
        memory_bytes=_peak_bytes(answerer.device),
        num_prompt_tokens=sum(batch.input_ids.numel() for batch in batches) / len(batches),
        num_visual_tokens=num_used / len(batches),
        used_share=num_used / max(num_slots, 1),
    )


def _shown(
    answerer: Answerer, question: Question, images: Mapping[str, SlicedImage], selection: AnswerSelection
) -> list[SlicedImage]:
    """Return the question's images, cut to global views if the model answers from these alone."""
    shown = [images[key] for key in question.image_keys]
    if (selection.sub_images or answerer.processor.image_processor.sub_images) == "all":
        return shown
    return [replace(image, sub_images=image.sub_images[:1]) for image in shown]


@torch.inference_mode()
def _project(answerer: Answerer, batch: Batch) -> None:
    answerer.model.project(batch.features, batch.cls_attention, batch.grids, num_slots=batch.num_slots)


def _seconds(device: str, act: Callable[[], object]) -> float:
    """Return the seconds that an action takes, with its work on the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    act()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _count_flops(
    answerer: Answerer,
    batches: Sequence[Batch],
    pixels: Sequence[Sequence[torch.Tensor]],
    encoder: FrozenEncoder,
    new_tokens: int,
) -> tuple[int, int, int, int]:
    """Return the FLOPs of encoder, projector, prompts and later tokens, each summed over all questions."""
    model, lengths = answerer.model, [batch.input_ids.numel() for batch in batches]
    shape = EncoderShape.of(
        encoder.model.config,
        select_layer=encoder.select_layer,
        attention_layers=encoder.attention_layers,
        importance=encoder.importance,
    )
    patch_pixels = 3 * encoder.patch_size**2
    llm = AnswerFlops.of(model.language_model)
    return (
        sum(shape.flops(part.numel() // patch_pixels) for parts in pixels for part in parts),
        sum(
            count_projector_flops(
                model.projector, b.features, b.cls_attention, b.grids, **model.token_count(b.num_slots)
            )
            for b in batches
        ),
        sum(llm.prompt(length) for length in lengths),
        sum(llm.later_tokens(length, new_tokens) for length in lengths),
    )


@torch.inference_mode()
def _count_used(answerer: Answerer, batch: Batch) -> int:
    names = ("input_ids", "attention_mask", "num_slots", "features", "cls_attention", "grids")
    _, attended_BL, _ = answerer.model.embed(**{name: getattr(batch, name) for name in names})
    return int((attended_BL & (batch.input_ids == answerer.model.config.image_token_id)).sum())


def describe_hardware(device: str) -> str:
    """Return the device's name with torch's version, on which a measurement depends besides the model."""
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return f"{name}, torch {torch.__version__}"


class TokenTimes(BaseStreamer):
    """Streamer for ``generate(streamer=...)`` that records the time of each answer token in `time.perf_counter` seconds.

    On a GPU it waits for every token; ``generate`` waits too, to see whether all answers have ended.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        # The first call of `generate` passes the prompt's tokens.
        if not self._is_prompt:
            self.seconds.append(time.perf_counter())
        self._is_prompt = False

    def end(self) -> None:
        pass


def _timed(answerer: Answerer, batches: Sequence[Batch], new_tokens: int) -> tuple[float, float]:
    """Return the seconds up to the first tokens, and from there to the last tokens, summed over all batches."""
    prefill_s = decode_s = 0.0
    # Work that is still queued on the GPU would count as the first batch's.
    if answerer.device == "cuda":
        torch.cuda.synchronize()
    for batch in batches:
        times, started = TokenTimes(), time.perf_counter()
        # Equal lengths, so that a model with short answers does not appear faster.
        answerer.generate(batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens, streamer=times)
        prefill_s += times.seconds[0] - started
        decode_s += times.seconds[-1] - times.seconds[0]
    return prefill_s, decode_s


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux gives KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
