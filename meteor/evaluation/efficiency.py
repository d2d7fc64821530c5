"""Measured cost of answers: time of the prompt's pass, speed of the tokens after it, and memory (paper, Table 4)."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from transformers.generation.streamers import BaseStreamer

from meteor.data.collate import Batch
from meteor.evaluation.answer import Answerer
from meteor.evaluation.questions import Question
from meteor.features import FeatureSource
from meteor.projector.answering import AS_TRAINED, AnswerSelection


@dataclass(frozen=True)
class Efficiency:
    """Measurements of a model that answers one question after the other.

    Attributes:
        hardware: device, number of threads on a CPU, and torch's version; compare only measurements on equal hardware.
        num_questions: questions per round.
        prefill_s: seconds per question for the prompt's pass, including the projector but not the reading of features;
            the median over rounds.
        tokens_per_s: speed of the answers after their first token; the median over rounds.
        memory_bytes: peak of the memory that torch allocated on the GPU, or of the process's memory on a CPU.
        num_prompt_tokens: mean number of prompt tokens per question, including visual tokens.
        num_visual_tokens: mean number of visual tokens per question, without slots that the projector leaves unused.
        used_share: share of the visual slots that hold a token; 1 except for adaptive projectors.
    """

    hardware: str
    num_questions: int
    prefill_s: float
    tokens_per_s: float
    memory_bytes: int
    num_prompt_tokens: float
    num_visual_tokens: float
    used_share: float


def measure_answers(
    answerer: Answerer,
    questions: Sequence[Question],
    source: FeatureSource,
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
        new_tokens: tokens per answer, at least 2.
        rounds: number of timed rounds, which follow an untimed one.
        selection: changes of the token selection.
    """
    assert new_tokens > 1, "speed is measured after the first token"
    answerer.choose(selection)
    batches = [answerer.batch([question], source, selection=selection) for question in questions]
    if answerer.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    prefills, decodes = [], []
    for number in range(rounds + 1):
        prefill_s, decode_s = _timed(answerer, batches, new_tokens)
        # The first round loads kernels and fills caches.
        if number:
            prefills.append(prefill_s)
            decodes.append(decode_s)
    num_slots = sum(batch.num_visual_tokens for batch in batches)
    num_used = sum(_count_used(answerer, batch) for batch in batches)
    generated = len(batches) * (new_tokens - 1)
    return Efficiency(
        hardware=describe_hardware(answerer.device),
        num_questions=len(batches),
        prefill_s=median(prefills) / len(batches),
        tokens_per_s=generated / median(decodes),
        memory_bytes=_peak_bytes(answerer.device),
        num_prompt_tokens=sum(batch.input_ids.numel() for batch in batches) / len(batches),
        num_visual_tokens=num_used / len(batches),
        used_share=num_used / max(num_slots, 1),
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
