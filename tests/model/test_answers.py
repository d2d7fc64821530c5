"""The chunked loss against torch's own on all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meteor.model import answers
from meteor.model.answers import AnswerHead

# Against fp32 on the same bf16 numbers: what rounding the slopes to bf16 may change.
TOLERANCES = {
    torch.float64: {"rtol": 1e-6, "atol": 1e-6},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(answers, "CHUNK_TOKENS", 3)


def make_head(bias, dtype=torch.float32):
    torch.manual_seed(0)
    return AnswerHead.around(nn.Linear(8, 11, bias=bias, dtype=dtype))


def losses(head, num_tokens, dtype):
    """(loss, gradients) of the chunked and of the plain way, the latter in float64."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 8, generator=generator).to(dtype)
    labels = torch.randint(11, (num_tokens,), generator=generator)
    parameters = list(head.parameters())
    results = []
    for chunked in (True, False):
        inputs = [hidden.clone().requires_grad_(), *parameters] if chunked else None
        if chunked:
            loss = head(inputs[0], labels)
        else:
            inputs = [x.detach().double().requires_grad_() for x in (hidden, *parameters)]
            loss = F.cross_entropy(F.linear(*inputs), labels, reduction="sum")
        results.append((loss, torch.autograd.grad(loss / 7, inputs)))
    return results


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 7])
def test_loss_and_gradients_are_those_of_all_logits_at_once(num_tokens, bias, dtype):
    (loss, grads), (expected, expected_grads) = losses(make_head(bias, dtype), num_tokens, dtype)
    torch.testing.assert_close(loss.double(), expected, **TOLERANCES[dtype])
    for grad, other in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), other, **TOLERANCES[dtype])


def test_a_frozen_head_has_no_gradient_and_its_input_has():
    head = make_head(bias=False).requires_grad_(False)
    hidden = torch.randn(5, 8, requires_grad=True)
    head(hidden, torch.arange(5)).backward()
    expected = torch.autograd.grad(F.cross_entropy(head(hidden), torch.arange(5), reduction="sum"), hidden)
    torch.testing.assert_close(hidden.grad, *expected)
    assert head.weight.grad is None


def test_without_gradients_no_gradient_is_computed(monkeypatch):
    head, made = make_head(bias=True), []
    monkeypatch.setattr(torch, "empty_like", lambda *arguments, **options: made.append("gradient"))
    with torch.no_grad():
        loss = head(torch.randn(5, 8), torch.arange(5))
    assert not loss.requires_grad
    assert made == []


def test_never_more_logits_than_a_chunk(monkeypatch):
    head, sizes, linear = make_head(bias=False), [], F.linear

    def note(*arguments):
        sizes.append(arguments[0].shape[0])
        return linear(*arguments)

    monkeypatch.setattr(F, "linear", note)
    head(torch.randn(8, 8, requires_grad=True), torch.arange(8)).backward()
    assert sizes == [3, 3, 2]
