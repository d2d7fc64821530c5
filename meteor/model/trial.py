"""Trial of a language model's architecture: which arrangements of samples in rows give each sample its own logits.

A tiny random model of the same architecture computes a few short samples in every arrangement. The truth is the model
itself with its eager attention and each sample alone, without any code of this project. Nothing depends on names of
architectures, so that a new one is tried like the others.

Letters: B rows, L sequence, D LLM width, V vocabulary.
"""

import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from meteor.errors import SettingsError
from meteor.model.attention import IMPLEMENTATIONS, Layout
from meteor.model.language_model import accept_embeddings, set_attention
from meteor.model.rows import arrange
from meteor.model.tiny import tiny_model
from meteor.model.ways import Ways

# Tokens of the trial's samples: of different lengths, and longer than the tiny model's windows.
_LENGTHS = (13, 9, 16)
# Largest difference between two logits, in standard deviations of the logits, that rounding explains in float32. Leaks
# and missing parts of the attention made differences above 0.01.
_TOLERANCE = 2e-3
# Attention of transformers, with masks that the model makes itself.
_OWN = ("eager", "sdpa")


def find_ways(config: PretrainedConfig) -> Ways:
    """Try the architecture of a causal LM's configuration; less than a second, and its result is kept."""
    return _find(json.dumps(config.to_dict(), sort_keys=True, default=str), _Unseen(config))


@dataclass(frozen=True)
class _Unseen:
    """A configuration that does not take part in the comparison of the cache's keys, as it cannot be hashed."""

    config: Any = field(compare=False)


@functools.lru_cache(maxsize=64)
def _find(text: str, unseen: _Unseen) -> Ways:
    name, has_sdpa = _declared(unseen.config)
    with _quiet():
        model: Any = None
        try:
            model = tiny_model(unseen.config)
            trial = _Trial(model)
        except Exception as error:  # noqa: BLE001  (each class of transformers stumbles in its own way)
            if model is not None and _takes_words(model):
                return _refused(name, f"it takes words but no embeddings, which visual tokens are ({_said(error)})")
            single = {"eager": None, "sdpa": None if has_sdpa else f"{name} has no sdpa"}
            return Ways(name, single=single, problem=f"a tiny model of it cannot be tried ({_said(error)})")
        if trial.sees_ahead():
            return _refused(
                name, "a later token changes the logits of an earlier one, so it is no causal language model"
            )
        return Ways(
            name,
            packed={attention: _reason(trial, trial.packed, attention) for attention in IMPLEMENTATIONS},
            single={attention: _reason(trial, trial.single, attention) for attention in _OWN},
            answering=_reason(trial, trial.answers, "eager"),
        )


def _refused(name: str, reason: str) -> Ways:
    return Ways(name, dict.fromkeys(IMPLEMENTATIONS, reason), dict.fromkeys(_OWN, reason), reason)


@torch.no_grad()
def _takes_words(model: Any) -> bool:
    try:
        model(input_ids=torch.tensor([[1, 3, 5]]), use_cache=False)
    except Exception:  # noqa: BLE001  (as in `_find`)
        return False
    return True


def _declared(config: PretrainedConfig) -> tuple[str, bool]:
    """Return the name of a configuration's model class, and whether the class declares to support sdpa."""
    try:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return config.model_type, False
    return model_class.__name__, bool(getattr(model_class, "_supports_sdpa", False))


class _Trial:
    """A tiny model with three samples, and the logits that each has alone."""

    def __init__(self, model: Any) -> None:
        accept_embeddings(model)
        self.model = model
        width = model.get_input_embeddings().weight.shape[1]
        generator = torch.Generator().manual_seed(1)
        scale = float(model.get_input_embeddings().weight.detach().std())
        self.samples = [scale * torch.randn(length, width, generator=generator) for length in _LENGTHS]
        self.truth = [self._alone(sample) for sample in self.samples]
        if not all(torch.isfinite(logits).all() for logits in self.truth):
            raise ValueError("its logits are not finite")
        self.spread = float(torch.cat(self.truth).std())

    @torch.no_grad()
    def _alone(self, sample_LD: torch.Tensor) -> torch.Tensor:
        logits = self.model(inputs_embeds=sample_LD[None], use_cache=False).logits
        assert isinstance(logits, torch.Tensor)
        return logits[0]

    def sees_ahead(self) -> bool:
        changed = torch.cat([self.samples[0][:-1], self.samples[1][:1]])
        return self._differ(self._alone(changed)[:-1], self.truth[0][:-1]) > _TOLERANCE

    def packed(self) -> str | None:
        """Compute all samples in a row, and again after a change of the first."""
        row, changed = self._rows([[0, 1, 2]]), self._rows([[0, 1, 2]], other_first=True)
        leak = max(self._differ(before, after) for before, after in zip(row[1:], changed[1:], strict=True))
        if leak > _TOLERANCE:
            return (
                f"a neighbour in the row changes a sample's logits, by up to {leak:.2g} of their spread: the model mixes "
                "tokens by more than attention"
            )
        return self._off(row, "in a row with others")

    def single(self) -> str | None:
        """Compute each sample in a row of its own, with padding behind the shorter ones."""
        return self._off(self._rows([[0], [1], [2]]), "with padding behind it")

    @torch.no_grad()
    def answers(self) -> str | None:
        """Answer prompts of different lengths together, with padding before the shorter ones."""
        together = self._answers(self.samples)
        alone = [self._answers([sample])[0] for sample in self.samples]
        off = max(self._differ(*pair) for pair in zip(together, alone, strict=True))
        if off > _TOLERANCE:
            return f"padding before a prompt changes the logits of its answer, by up to {off:.2g} of their spread"
        return None

    def _answers(self, samples: list[torch.Tensor]) -> list[torch.Tensor]:
        longest = max(map(len, samples))
        embeds = torch.stack([F.pad(sample, (0, 0, longest - len(sample), 0)) for sample in samples])
        seen = torch.stack([torch.arange(longest) >= longest - len(sample) for sample in samples]).long()
        # The first token of an answer is forced, so that a rounding error cannot choose another.
        forced: Any = lambda row, ids: [7]  # noqa: E731
        output = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=seen,
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            prefix_allowed_tokens_fn=forced,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return list(torch.stack(output.logits, dim=1))

    @torch.no_grad()
    def _rows(self, rows: list[list[int]], *, other_first: bool = False) -> list[torch.Tensor]:
        """Return the logits of each sample, computed in the given rows by this project's code."""
        samples = list(self.samples)
        if other_first:
            samples[0] = samples[0].flip(0)
        lengths = [sum(len(samples[i]) for i in row) for row in rows]
        embeds_BLD = torch.zeros(len(rows), max(lengths), samples[0].shape[1])
        sample_BL = torch.zeros(embeds_BLD.shape[:2], dtype=torch.long)
        for place, row in enumerate(rows):
            joined = torch.cat([samples[i] for i in row])
            embeds_BLD[place, : len(joined)] = joined
            numbers = [torch.full((len(samples[i]),), n) for n, i in enumerate(row, start=1)]
            sample_BL[place, : len(joined)] = torch.cat(numbers)
        arranged = arrange(self.model.config, embeds_BLD, Layout.of(sample_BL, sample_BL > 0))
        logits_BLV = arranged.restore(self.model(**arranged.inputs, use_cache=False).logits, embeds_BLD.shape[:2])
        return [
            logits_BLV[place][sample_BL[place] == n] for place, row in enumerate(rows) for n in range(1, len(row) + 1)
        ]

    def _off(self, found: list[torch.Tensor], where: str) -> str | None:
        off = max(self._differ(*pair) for pair in zip(found, self.truth, strict=True))
        if off <= _TOLERANCE:
            return None
        return (
            f"a sample {where} has other logits than alone with the model's eager attention, by up to {off:.2g} of their "
            "spread: this way leaves out a part of the model, such as windows, sinks or caps"
        )

    def _differ(self, found: torch.Tensor, expected: torch.Tensor) -> float:
        off = float((found - expected).abs().max()) / self.spread
        return off if off == off else float("inf")


def _reason(trial: _Trial, attempt: Callable[[], str | None], attention: str) -> str | None:
    """Make one attempt with an attention, and return why it does not work, or None."""
    try:
        set_attention(trial.model, attention)
        return attempt()
    except SettingsError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  (as in `_find`)
        return f"it fails with {_said(error)}"
    finally:
        trial.model.set_attn_implementation("eager")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers, which warns about absent kernels and sizes of tiny models."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)
