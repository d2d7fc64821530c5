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


def test_an_unknown_projector_is_answered_with_the_names_known() -> None:
    with pytest.raises(SettingsError, match=r"'metoer'.*meteor, meteor_37m, mlp"):
        visual_token_budget("metoer", {})


@pytest.mark.parametrize("k", [0, -1, 1.5, "64", True, None])
def test_a_k_that_is_no_count_is_refused(k: object) -> None:
    with pytest.raises(SettingsError, match="k is"):
        visual_token_budget("meteor", {"k": k})


@pytest.mark.parametrize("projector", ["mlp", "meteor"])
def test_a_budget_travels_between_processes(projector: str) -> None:
    budget = visual_token_budget(projector, {})
    assert pickle.loads(pickle.dumps(budget))(GRIDS) == budget(GRIDS)


def test_planning_and_decoding_do_not_import_torch() -> None:
    code = (
        "import sys, meteor.image.budget, meteor.image.slicing, meteor.image.decode; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
