"""Every file of a finished run damaged in turn: no damage changes what is read without an error that names it."""

import shutil

import pytest
from damage import damage_everything

pytestmark = [pytest.mark.usefixtures("ray_once"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_damage_to_a_finished_run_is_refused_or_harmless(chain, tmp_path):
    assert chain.evaluated
    out = shutil.copytree(chain.settings.output, tmp_path / "out")
    kinds = damage_everything(out, flips=12)
    assert len(kinds) > 20
    assert {name: kind.silent for name, kind in kinds.items() if kind.silent} == {}
    assert {name: kind.raw for name, kind in kinds.items() if kind.raw} == {}
    assert {name: kind.unverified for name, kind in kinds.items() if kind.unverified} == {}
    # Nobody reads a rank's list of fragments once the manifest holds it.
    assert [name for name, kind in kinds.items() if not kind.refused and "rank_N.json" not in name] == []
