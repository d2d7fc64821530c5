"""Access to any causal LM of transformers: its attention, its output layer, and answers to embeddings.

Nothing here depends on names of architectures: what a model does is tried.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from meteor.errors import SettingsError

_NUM_PROBED = 3


def set_attention(model: Any, attention: str) -> None:
    """Set the attention of a model.

    Raises:
        SettingsError: the model does not support it.
    """
    name = type(model).__name__
    if not model._can_set_attn_implementation():
        # Models with attention classes of their own are built with the eager class.
        model.config._attn_implementation = "eager"
        if attention == "eager":
            return
        raise SettingsError(f"{name} computes its attention itself, so attention cannot be {attention!r}: take 'eager'")
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise SettingsError(f"{name} does not support attention {attention!r}: take 'eager'") from error


def set_supported_attention(model: Any, attention: str) -> None:
    """Set an attention that transformers chose for the model as a whole; a part without ``sdpa`` gets its eager attention."""
    supported = attention != "sdpa" or (model._supports_sdpa and model._can_set_attn_implementation())
    set_attention(model, attention if supported else "eager")


def accept_embeddings(language_model: Any) -> None:
    """Let ``generate`` of a model take embeddings if only the signature of its preparation forgets them.

    transformers reads the signature before it generates. Bamba and Falcon-H1 hand all arguments on to the code that
    prepares embeddings, and name none of them.
    """
    prepare = language_model.prepare_inputs_for_generation
    parameters = inspect.signature(prepare).parameters
    if "inputs_embeds" in parameters or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return

    @functools.wraps(prepare)
    def with_embeddings(input_ids: Any, *args: Any, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        return prepare(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    del with_embeddings.__wrapped__
    language_model.prepare_inputs_for_generation = with_embeddings


def remove_dropout(model: nn.Module) -> None:
    """Switch off the dropout that a language model's configuration brings, as GPT-2's does: no stage trains with it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@torch.no_grad()
def changes_logits(language_model: Any) -> bool:
    """Return whether a model changes its decoder's output before its output layer, or the logits after it.

    Gemma caps its logits, Granite and Cohere scale them, MiniCPM scales the hidden states. For the trial the decoder and the
    output layer give random numbers, so that no weight is used: ZeRO-3 may have distributed them.
    """
    head, decoder = language_model.get_output_embeddings(), language_model.base_model
    if decoder is language_model:
        return True
    weight = next(language_model.parameters())
    # A model on the meta device has shapes alone, and numbers are needed.
    device = "cpu" if weight.is_meta else weight.device
    generator = torch.Generator("cpu").manual_seed(0)
    hidden, logits = (
        torch.randn(1, _NUM_PROBED, size, generator=generator, device="cpu").to(device)
        for size in (head.in_features, head.out_features)
    )
    received: list[torch.Tensor] = []

    def give_logits(values: torch.Tensor) -> torch.Tensor:
        received.append(values)
        return logits.clone()

    with _answering(decoder, lambda *args, **kwargs: _Decoded(hidden.clone())), _answering(head, give_logits):
        try:
            output = language_model(inputs_embeds=hidden, use_cache=False).logits
        # A model that needs more than hidden states from its decoder keeps its own forward pass, which is always right.
        except Exception:  # noqa: BLE001
            return True
    return len(received) != 1 or not torch.equal(received[0], hidden) or not torch.equal(output, logits)


class _Decoded:
    """Output of a decoder; what a model reads besides hidden states, such as a cache or routers, is None."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> torch.Tensor | None:
        return self.last_hidden_state if place == 0 else None

    def __getattr__(self, name: str) -> Any:
        return None


@contextmanager
def _answering(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let a module answer with a function in the block."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
