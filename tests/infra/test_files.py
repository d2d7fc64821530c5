"""Linters of images and scripts, the dashboard, and what a job takes to the cluster."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from pipelines.ray_parts.live_metrics import COUNTERS, GAUGES

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCRIPTS = [path for path in [*ROOT.glob(".ci/*"), *ROOT.glob("infra/**/*.sh")] if path.is_file()]


@pytest.mark.parametrize("image", sorted(ROOT.glob("infra/images/*.Dockerfile")), ids=lambda path: path.name)
def test_hadolint_finds_nothing(image):
    done = subprocess.run([BIN / "hadolint", image], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout


def test_shellcheck_finds_nothing():
    done = subprocess.run([BIN / "shellcheck", *SCRIPTS], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout


def test_images_copy_what_is_there():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for image in ROOT.glob("infra/images/*.Dockerfile"):
        for line in re.findall(r"^COPY (?!--from)(.+)$", image.read_text(), re.MULTILINE):
            for name in line.split()[:-1]:
                assert (ROOT / name).exists()
                assert name in allowed


def test_the_dashboard_asks_for_metrics_that_stages_set():
    dashboard = json.loads((ROOT / "infra/observability/dashboard.json").read_text())
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            asked |= set(re.findall(r"ray_meteor_\w+", target["expr"]))
    assert asked == exported_names()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def exported_names() -> set[str]:
    """As the cluster test finds them at the nodes' metrics ports."""
    return {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}


def test_what_travels_with_a_job_is_small_and_whole(tmp_path):
    # As in a checkout where things have been run: files that git ignores lie about.
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis")
    )
    (copy / "outputs/demo").mkdir(parents=True, exist_ok=True)
    (copy / "outputs/demo/large.bin").write_bytes(bytes(1 << 20))
    (copy / ".env").write_text("SECRET=1")
    package = tmp_path / "package.zip"
    create_package(
        str(copy),
        package,
        include_gitignore=True,
        include_parent_dir=False,
        excludes=get_runtime_env_default_excludes(),
    )
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
    assert package.stat().st_size < 3 << 20
    for pattern in ("*.py", "*.yaml", "*.csv", "*.j2"):
        for folder in ("meteor", "pipelines", "jobs"):
            for file in (copy / folder).rglob(pattern):
                assert str(file.relative_to(copy)) in names
    assert not [name for name in names if name.startswith(("outputs/", "tests/", "benchmarks/", "infra/", ".env"))]
