"""Projectors by name: settings, sizes, saving and rebuilding."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meteor.errors import SettingsError
from meteor.projector import build_projector
from meteor.projector.registry import PROJECTORS

# Settings that differ from the defaults, small enough for tiny maps.
METEOR_SETTINGS = {"k": 3, "window": 5, "local": "conv", "scan": "both", "state_size": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "meteor": METEOR_SETTINGS,
    "meteor_37m": METEOR_SETTINGS,
    "resampler": {"k": 6},
    "tokenpacker": {"scale_factor": 3},
}


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        *(
            (name, 31_467_520)
            for name in ("mlp", "global_view", "avg_pool", "visual_topk", "visionzip", "prumerge_plus")
        ),
        ("pixel_shuffle", 47_204_352),
        ("ldpv2", 31_518_720),
        ("c_abstractor", 47_885_824),
        ("llava_mini", 35_666_944),
        ("meteor", 34_991_104),
        ("meteor_37m", 37_081_088),
        ("resampler", 137_840_640),
    ],
)
def test_projectors_have_the_published_number_of_parameters(name: str, num_parameters: int) -> None:
    with torch.device("meta"):
        projector = build_projector(name, vision_width=1024, llm_width=5120)
    assert sum(parameter.numel() for parameter in projector.parameters()) == num_parameters


def test_meteor_stays_within_the_papers_37_million() -> None:
    with torch.device("meta"):
        projector = build_projector("meteor", vision_width=1024, llm_width=5120, scan="both", local="conv")
    assert sum(parameter.numel() for parameter in projector.parameters()) <= 37_080_000


def test_an_unknown_projector_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"'qformer'.*mlp, global_view, avg_pool.*meteor, meteor_37m"):
        build_projector("qformer", vision_width=16, llm_width=8)


def test_an_unknown_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"'meteor' does not know 'K', 'lamda'; its settings are: k, visual_weight"):
        build_projector("meteor", vision_width=16, llm_width=8, lamda=0.5, K=3)
    with pytest.raises(SettingsError, match=r"'mlp' does not know 'k'; it has no settings"):
        build_projector("mlp", vision_width=16, llm_width=8, k=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": True}, "k is True"),
        ({"visual_weight": -0.1}, "visual_weight is -0.1"),
        ({"experts": "visual-native"}, "experts is 'visual-native'"),
        ({"selection_gradient": "gumbel"}, "none, straight_through"),
        ({"window": 4}, "3, 5, 7"),
        ({"local": "max"}, "mean, conv"),
        ({"scan": "zigzag"}, "single, local_to_single, both"),
        ({"state_size": 0}, "state_size is 0"),
        ({"scan_backend": "cuda_magic"}, "auto, reference"),
    ],
)
def test_settings_out_of_range_are_refused_when_building(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build_projector("meteor", vision_width=16, llm_width=8, **settings)


@pytest.mark.parametrize("name", PROJECTORS)
def test_a_projector_rebuilt_from_its_settings_and_weights_gives_the_same_tokens(
    name: str, make_sub_images: Callable[..., Any]
) -> None:
    given = SETTINGS.get(name, {})
    projector = build_projector(name, vision_width=16, llm_width=24, **given)
    assert projector.settings | {"name": name, "vision_width": 16, "llm_width": 24, **given} == projector.settings
    rebuilt = build_projector(**json.loads(json.dumps(projector.settings)))
    rebuilt.load_state_dict(projector.state_dict())
    batch = make_sub_images((2, 3), (2, 2))
    expected = projector(batch.features, batch.cls_attention, batch.grids)
    assert torch.equal(rebuilt(batch.features, batch.cls_attention, batch.grids).tokens, expected.tokens)
    assert rebuilt.settings == projector.settings


def test_settings_hold_the_defaults_that_were_not_given() -> None:
    settings = build_projector("meteor", vision_width=16, llm_width=8).settings
    assert settings["k"] == 144
    assert settings["visual_weight"] == 0.8
    assert settings["experts"] == "visual_native"
    assert settings["scan"] == "local_to_single"


def test_the_projector_that_the_documentation_shows_works(
    make_sub_images: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs/extend.md").read_text()
    module, _, test = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"build_projector": build_projector}
    exec(module, names)
    monkeypatch.setitem(PROJECTORS, "every_few", names["EveryFew"])
    exec(test, names)
    names["test_every_few_patches_go_through_the_mlp"](make_sub_images)
