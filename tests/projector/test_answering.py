"""Projectors after training: another number of tokens, another weight of the experts, against projectors built with them."""

import pytest
import torch

from meteor.errors import SettingsError
from meteor.image.elastic import COUNT_SETTINGS, with_count
from meteor.projector import build_projector
from meteor.projector.answering import AS_TRAINED, AnswerSelection, set_selection
from meteor.projector.registry import PROJECTORS

WIDTHS = {"vision_width": 16, "llm_width": 32}


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    features, attention = torch.randn(2, 12, 16, generator=generator), torch.rand(2, 12, generator=generator)
    return features, attention / attention.sum(1, keepdim=True), torch.tensor([[3, 4], [2, 6]])


@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("name", COUNT_SETTINGS)
def test_a_call_with_k_is_that_of_a_projector_built_with_k_and_the_same_weights(name, k):
    torch.manual_seed(0)
    settings = {"grid": [1, 2, 3]} if COUNT_SETTINGS[name][0] == "grid" else {"k": [1, 4, 9]}
    elastic = build_projector(name, **WIDTHS, **settings)
    alone = build_projector(name, **WIDTHS, **with_count(name, settings, k))
    # Queries are a prefix; positions belong to the number of queries.
    weights = {key: value[:k] if key == "queries" else value for key, value in elastic.state_dict().items()}
    alone.load_state_dict(weights | {key: value for key, value in alone.state_dict().items() if key == "positions"})
    largest = elastic(*make_inputs())
    found, expected = elastic(*make_inputs(), k=k), alone(*make_inputs())
    assert found.tokens.shape[1] == k
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=0, atol=0)
    assert torch.equal(found.mask, expected.mask)
    # The largest number is the default, and a call leaves no trace.
    assert largest.tokens.shape[1] == 9
    assert torch.equal(elastic(*make_inputs()).tokens, largest.tokens)


def test_every_weight_learns_from_every_number_but_the_queries_beyond_it():
    for name in COUNT_SETTINGS:
        settings = {"grid": [1, 2]} if COUNT_SETTINGS[name][0] == "grid" else {"k": [1, 4]}
        projector = build_projector(name, **WIDTHS, **settings)
        projector(*make_inputs(), k=1).tokens.square().sum().backward()
        # Under ZeRO every rank reduces every gradient in every step.
        assert all(weight.grad is not None for weight in projector.parameters() if weight.requires_grad), name


def test_the_table_of_numbers_names_the_projectors_that_take_k():
    def takes_k(name):
        return build_projector(name, vision_width=16, llm_width=32).takes_k

    assert {name for name in PROJECTORS if takes_k(name)} == COUNT_SETTINGS.keys()


@pytest.mark.parametrize(("name", "settings"), [("mlp", {"k": [1, 4]}), ("c_abstractor", {"grid": [1, 4]})])
def test_a_projector_for_a_single_number_is_not_built_with_several(name, settings):
    with pytest.raises(SettingsError, match=r"does not know 'k'|trained with a single number"):
        build_projector(name, **WIDTHS, **settings)


@pytest.mark.parametrize(("name", "weight"), [("meteor", 0.9), ("meteor_37m", 0.1)])
def test_a_changed_weight_is_that_of_a_projector_built_with_it(name, weight):
    trained, expected = (build_projector(name, **WIDTHS, k=6, **more) for more in ({}, {"visual_weight": weight}))
    expected.load_state_dict(trained.state_dict())
    before = trained(*make_inputs()).tokens
    set_selection(trained, AnswerSelection(visual_weight=weight))
    assert torch.equal(trained(*make_inputs()).tokens, expected(*make_inputs()).tokens)
    set_selection(trained, AS_TRAINED)
    assert torch.equal(trained(*make_inputs()).tokens, before)


@pytest.mark.parametrize(
    ("name", "settings", "weight", "message"),
    [
        ("visual_topk", {}, 0.3, "has no visual_weight that may change after training"),
        ("meteor", {"experts": "visual"}, 0.3, "has no visual_weight"),
        ("meteor", {}, 1.3, "visual_weight is 1.3"),
    ],
)
def test_a_weight_that_the_projector_lacks_is_refused(name, settings, weight, message):
    with pytest.raises(SettingsError, match=message):
        set_selection(build_projector(name, **WIDTHS, **settings), AnswerSelection(visual_weight=weight))
