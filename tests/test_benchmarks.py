"""The benchmark scripts run at their smallest size, so that a change of the library cannot break them unseen."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "train.py --shape tiny --steps 1 --rounds 1 --batch 4",
    "generate.py --batches 1 --sub-images 2 --new-tokens 3 --rounds 1",
    "text_sampler.py --tiny --rounds 1",
    "fusion.py --tiny --rounds 1",
    "projectors.py --tiny --rounds 1",
    "encoding.py --images 4 --width 64 --layers 2 --rounds 1",
)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_runs_and_prints_a_ratio(command, tmp_path):
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *options], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\d x\b|\b\d\.\d\d\b", done.stdout), done.stdout
