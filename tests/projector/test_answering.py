"""Selection that changes between training and answering, against a projector built with the changed settings."""

import pytest
import torch

from meteor.errors import SettingsError
from meteor.projector import build_projector
from meteor.projector.answering import AS_TRAINED, AnswerSelection, set_selection

WIDTHS = {"vision_width": 16, "llm_width": 32}


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    features, attention = torch.randn(2, 12, 16, generator=generator), torch.rand(2, 12, generator=generator)
    return features, attention / attention.sum(1, keepdim=True), torch.tensor([[3, 4], [2, 6]])


@pytest.mark.parametrize(
    ("name", "changes"),
    [("meteor", {"k": 3, "visual_weight": 0.9}), ("meteor_37m", {"visual_weight": 0.1}), ("visual_topk", {"k": 2})],
)
def test_a_changed_selection_is_that_of_a_projector_built_with_it(name, changes):
    trained, expected = build_projector(name, **WIDTHS, k=6), build_projector(name, **WIDTHS, **{"k": 6, **changes})
    expected.load_state_dict(trained.state_dict())
    before = trained(*make_inputs()).tokens
    set_selection(trained, AnswerSelection(**changes))
    assert torch.equal(trained(*make_inputs()).tokens, expected(*make_inputs()).tokens)
    assert trained.settings["k"] == 6
    set_selection(trained, AS_TRAINED)
    assert torch.equal(trained(*make_inputs()).tokens, before)


@pytest.mark.parametrize(
    ("name", "settings", "changes", "message"),
    [
        ("mlp", {}, {"k": 3}, "evaluate.k=3: projector 'mlp' has no k"),
        ("resampler", {}, {"k": 3}, "projector 'resampler' has no k"),
        ("visual_topk", {}, {"visual_weight": 0.3}, "has no visual_weight that may change after training"),
        ("meteor", {"experts": "visual"}, {"visual_weight": 0.3}, "has no visual_weight"),
        ("meteor", {}, {"k": 0}, "k"),
    ],
)
def test_a_setting_that_the_projector_lacks_is_refused(name, settings, changes, message):
    with pytest.raises(SettingsError, match=message):
        set_selection(build_projector(name, **WIDTHS, **settings), AnswerSelection(**changes))
