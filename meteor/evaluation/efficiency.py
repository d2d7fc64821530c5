"""What answering costs: the prompt's pass and the tokens after it timed apart, and memory (paper, Table 4)."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from transformers.generation.streamers import BaseStreamer

from meteor.constants import IMAGE_TOKEN_ID
from meteor.data.collate import Batch
from meteor.evaluation.answer import Answerer
from meteor.evaluation.questions import Question
from meteor.features import FeatureSource


@dataclass(frozen=True)
class Efficiency:
    """Of answering one question after the other.

    Attributes:
        hardware: device, threads where it is the CPU, and torch's version: only rows of the same hardware compare.
        num_questions: asked in each round.
        prefill_s: seconds of the prompt's pass, projector included, features at hand: median over rounds of the mean of a
            question.
        tokens_per_s: of the answers after their first token: median over rounds.
        memory_bytes: at the peak; allocated on the GPU, else of the process.
        num_prompt_tokens: mean of a question, visual ones included.
        num_visual_tokens: mean of a question; those that are real, where a projector leaves slots unused.
        used_share: of the visual slots, those with a real token: 1 but for adaptive projectors.
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
) -> Efficiency:
    """Answer each question by itself, exactly ``new_tokens`` long, several times over.

    Args:
        answerer: the model, which nothing else should be using.
        questions: the same for all models that are compared.
        source: where their features come from; reading them is not timed.
        new_tokens: at least 2.
        rounds: timed, after one that is not.
    """
    assert new_tokens > 1, "speed is measured after the first token"
    batches = [answerer.batch([question], source) for question in questions]
    if answerer.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    prefills, decodes = [], []
    for number in range(rounds + 1):
        prefill_s, decode_s = _timed(answerer, batches, new_tokens)
        if number:  # the first round loads kernels and caches
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
    return int((attended_BL & (batch.input_ids == IMAGE_TOKEN_ID)).sum())


def describe_hardware(device: str) -> str:
    """What a measurement depends on besides the model."""
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return f"{name}, torch {torch.__version__}"


class TokenTimes(BaseStreamer):
    """For ``generate(streamer=...)``: when each token of the answers was there, in `time.perf_counter` seconds.

    On a GPU it waits for every token, as ``generate`` does anyway to see whether all answers have ended.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt:
            self.seconds.append(time.perf_counter())
        self._is_prompt = False

    def end(self) -> None:
        pass


def _timed(answerer: Answerer, batches: Sequence[Batch], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first tokens, and from there to the last ones, of all batches."""
    prefill_s = decode_s = 0.0
    if answerer.device == "cuda":
        torch.cuda.synchronize()
    for batch in batches:
        times, started = TokenTimes(), time.perf_counter()
        answerer.generate(batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens, streamer=times)
        prefill_s += times.seconds[0] - started
        decode_s += times.seconds[-1] - times.seconds[0]
    return prefill_s, decode_s


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
