"""Training engine in plain data-parallel torch: the readable reference, for machines without DeepSpeed."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from meteor.checkpoint.format import KINDS, Checkpoint, Fragment
from meteor.train.protocol import BETAS, EPS, MicroStep, all_reduce_sum, rank, trained_parameters, world_size


class TorchEngine:
    """AdamW on fp32 master weights; gradients are summed over workers, and every worker holds the whole state."""

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        max_grad_norm: float,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.model = model.to(device=device, dtype=dtype)
        self.device, self.max_grad_norm = device, max_grad_norm
        self.rank, self.world_size = rank(), world_size()
        self._parameters = trained_parameters(self.model)
        self._masters = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in self._parameters.items()
        }
        # On a GPU torch's default Adam makes temporary copies of whole states; the fused kernel makes none.
        fused = True if self.device.type == "cuda" else None
        self._optimizer = torch.optim.AdamW(
            self._masters.values(), lr=0.0, betas=BETAS, eps=EPS, weight_decay=0.0, fused=fused
        )
        if checkpoint is not None:
            self._load(checkpoint)

    def forward_backward(self, inputs: dict[str, Any], *, last: bool) -> MicroStep:
        output = self.model(**inputs, skip_logits=True)
        output.loss.backward()
        return MicroStep(output.loss.detach(), output.selection_sums)

    @torch.no_grad()
    def evaluate(self, inputs: dict[str, Any]) -> MicroStep:
        training = self.model.training
        output = self.model.eval()(**inputs, skip_logits=True)
        self.model.train(training)
        return MicroStep(output.loss, output.selection_sums)

    def step(self, lr: float) -> float:
        for name, parameter in self._parameters.items():
            # A parameter without gradient here may have one on another worker, and all workers must join each
            # reduction.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self._masters[name].grad = all_reduce_sum(gradient.float())
            if parameter is not self._masters[name]:
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), self.max_grad_norm)
        if torch.isfinite(norm):
            self._optimizer.param_groups[0]["lr"] = lr
            self._optimizer.step()
            self._copy_masters_back()
        self._optimizer.zero_grad()
        return float(norm)

    def fragments(self) -> Iterator[Fragment]:
        # Every worker holds the whole state, so each writes every world_size-th parameter.
        for i, (name, master) in enumerate(self._masters.items()):
            if i % self.world_size == self.rank:
                state = self._optimizer.state[master]
                yield Fragment("weights", name, 0, master)
                for kind in KINDS[1:]:
                    yield Fragment(kind, name, 0, state[kind])

    def _load(self, checkpoint: Checkpoint) -> None:
        for name, master in self._masters.items():
            with torch.no_grad():
                master.copy_(checkpoint.read("weights", name))
            self._optimizer.state[master] = {
                "step": torch.tensor(float(checkpoint.state["step"]), device=self.device),
                **{kind: checkpoint.read(kind, name).to(self.device) for kind in KINDS[1:]},
            }

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def _copy_masters_back(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not self._masters[name]:
                parameter.copy_(self._masters[name])
