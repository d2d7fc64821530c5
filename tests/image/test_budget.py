"""Visual-token budgets: counts by hand, and that planning needs no torch."""

import pickle
import subprocess
import sys

import pytest

from meteor.errors import SettingsError
from meteor.image.budget import visual_token_budget

GRIDS = [(29, 19), (12, 12), (5, 7)]


def test_the_mlp_keeps_every_patch() -> None:
    assert visual_token_budget("mlp", {})(GRIDS) == [551, 144, 35]


@pytest.mark.parametrize("projector", ["meteor", "meteor_37m"])
def test_meteor_keeps_k_tokens_or_the_whole_of_a_small_sub_image(projector: str) -> None:
    assert visual_token_budget(projector, {"k": 64})(GRIDS) == [64, 64, 35]


def test_meteor_keeps_144_tokens_by_default() -> None:
    assert visual_token_budget("meteor", {"visual_weight": 0.8})(GRIDS) == [144, 144, 35]


def test_the_resampler_makes_k_tokens_of_a_small_sub_image_too() -> None:
    assert visual_token_budget("resampler", {})(GRIDS) == [144, 144, 144]
    assert visual_token_budget("resampler", {"k": 32})(GRIDS) == [32, 32, 32]


def test_tokenpacker_divides_both_sides_and_rounds_up() -> None:
    assert visual_token_budget("tokenpacker", {})([*GRIDS, (24, 24)]) == [15 * 10, 36, 3 * 4, 144]
    assert visual_token_budget("tokenpacker", {"scale_factor": 3})([*GRIDS, (1, 1)]) == [10 * 7, 16, 2 * 3, 1]


def test_the_global_view_alone_gives_slices_nothing() -> None:
    assert visual_token_budget("global_view", {})(GRIDS) == [551, 0, 0]


def test_pooled_maps_and_queries_have_their_grids_tokens() -> None:
    for name in ("avg_pool", "ldpv2", "c_abstractor"):
        assert visual_token_budget(name, {})(GRIDS) == [144, 144, 144]
        assert visual_token_budget(name, {"grid": 5})(GRIDS) == [25, 25, 25]
    assert visual_token_budget("llava_mini", {})(GRIDS) == [1, 1, 1]


def test_what_is_pruned_is_bounded_by_its_settings_and_by_the_map() -> None:
    assert visual_token_budget("visual_topk", {"k": 64})(GRIDS) == [64, 64, 35]
    assert visual_token_budget("visionzip", {})(GRIDS) == [144, 144, 35]
    assert visual_token_budget("visionzip", {"dominant": 20, "contextual": 2})(GRIDS) == [22, 22, 22]
    assert visual_token_budget("prumerge_plus", {"max_tokens": 40})(GRIDS) == [40, 40, 35]


def test_focus_keeps_its_share_within_what_its_scales_can_make() -> None:
    assert visual_token_budget("focus", {})(GRIDS) == [276, 72, 18]
    assert visual_token_budget("focus", {"scales": [2, 4], "target_keep": 0.25})(GRIDS) == [138, 36, 9]
    # The finest cells are fewer than the share asks for, or the coarsest are more.
    assert visual_token_budget("focus", {"scales": [1, 4], "target_keep": 1.0})(GRIDS) == [551, 144, 35]
    assert visual_token_budget("focus", {"target_keep": 0.07})([(5, 7)]) == [2 * 2]
    with pytest.raises(SettingsError, match="scales is 2"):
        visual_token_budget("focus", {"scales": 2})
    with pytest.raises(SettingsError, match="target_keep is 2"):
        visual_token_budget("focus", {"target_keep": 2})


def test_an_unknown_projector_is_answered_with_the_names_known() -> None:
    with pytest.raises(SettingsError, match=r"'metoer'.*avg_pool.*meteor, meteor_37m, mlp"):
        visual_token_budget("metoer", {})


@pytest.mark.parametrize(("projector", "name"), [("meteor", "k"), ("resampler", "k"), ("tokenpacker", "scale_factor")])
@pytest.mark.parametrize("value", [0, -1, 1.5, "64", True, None])
def test_a_setting_that_is_no_count_is_refused(projector: str, name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=rf"{name} is {value!r}"):
        visual_token_budget(projector, {name: value})


@pytest.mark.parametrize(
    "projector", ["mlp", "global_view", "avg_pool", "meteor", "resampler", "tokenpacker", "visionzip", "focus"]
)
def test_a_budget_travels_between_processes(projector: str) -> None:
    budget = visual_token_budget(projector, {})
    assert pickle.loads(pickle.dumps(budget))(GRIDS) == budget(GRIDS)


def test_planning_and_decoding_do_not_import_torch() -> None:
    code = (
        "import sys, meteor.image.budget, meteor.image.slicing, meteor.image.decode; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
