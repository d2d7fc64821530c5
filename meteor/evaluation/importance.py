"""How much a question's words look at each kept patch of an image, layer by layer (FocusLLaVA's analysis, arXiv 2411.14228).

Letters: L sequence, K kept tokens of the global view.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from meteor.evaluation.answer import Answerer
from meteor.evaluation.questions import Question
from meteor.features import FeatureSource
from meteor.model.text_sampler import TokenGroups, importance


@dataclass(frozen=True, eq=False)
class ImportanceMaps:
    """Of the global view of a question's first image.

    Attributes:
        grid: (Hu, Wu).
        patches: (K,) which patch each token stands for.
        scores: (layers, K), see `meteor.model.text_sampler.importance`.
    """

    grid: tuple[int, int]
    patches: np.ndarray
    scores: np.ndarray


@torch.inference_mode()
def importance_maps(answerer: Answerer, question: Question, source: FeatureSource) -> ImportanceMaps | None:
    """Ask a question of which no layer drops anything, and record every layer.

    Returns:
        None where tokens stand for no single patch, or nothing is asked after the image.
    """
    model, batch = answerer.model, answerer.batch([question], source)
    inputs = batch.as_inputs()
    features = {name: inputs[name] for name in ("features", "cls_attention", "grids")}
    output = model.projector(*features.values(), None)
    if output.indices is None:
        return None
    groups = TokenGroups.of(batch.attention_mask, batch.turns, batch.image_numbers)
    with _everything_kept(model.text_sampler), _recorded(model.language_model, groups) as found:
        model(**{**inputs, "labels": None})
    slots = (batch.image_numbers[0] == 1).nonzero().squeeze(-1)[: int(batch.num_slots[0])]
    scores = torch.stack([score_BL[0, slots] for score_BL in found]).float().cpu().numpy()
    if np.isnan(scores).any():
        return None
    kept = output.mask[0]
    rows, columns = batch.grids[0].tolist()
    return ImportanceMaps((rows, columns), output.indices[0][kept].cpu().numpy(), scores[:, : int(kept.sum())])


@contextmanager
def _everything_kept(sampler: Any) -> Iterator[None]:
    if sampler is None:
        yield
        return
    keep, sampler.keep = sampler.keep, 1.0
    try:
        yield
    finally:
        sampler.keep = keep


@contextmanager
def _recorded(language_model: Any, groups: TokenGroups) -> Iterator[list[torch.Tensor]]:
    found: list[torch.Tensor] = []

    def record(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        found.append(importance(layer, hidden, kwargs["position_embeddings"], groups))

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in language_model.base_model.layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
