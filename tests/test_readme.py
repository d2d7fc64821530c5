"""What README and CONTRIBUTING name exists: paths, modules, make targets, subcommands, the imports of the example."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from meteor.cli.main import main

ROOT = Path(__file__).parents[1]
TEXT = "\n".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "infra/README.md"))


def named(pattern: str) -> list[str]:
    return sorted(set(re.findall(pattern, TEXT)))


@pytest.mark.parametrize(
    "path", named(r"(?<!//)(?:jobs/runs|meteor|pipelines|benchmarks|tests|train|infra)/[\w./-]*\w")
)
def test_paths_exist(path):
    path = path.replace("/.env", "/example.env")  # which users make of it
    candidates = [ROOT / path, ROOT / "meteor" / path]
    assert any(candidate.exists() for candidate in candidates)


@pytest.mark.parametrize("module", named(r"(?:python -m |\s{2,})((?:pipelines|jobs)\.\w+)"))
def test_modules_exist(module):
    assert importlib.util.find_spec(module)


@pytest.mark.parametrize("target", named(r"(?:`|\n)make (\w[\w-]*)"))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("words", named(r"\bmeteor ((?:config|data|cache|synthetic) [a-z]+)"))
def test_subcommands_exist(words):
    with pytest.raises(SystemExit) as stopped:
        main([*words.split(), "--help"])
    assert stopped.value.code == 0


@pytest.mark.parametrize("name", named(r"`(test_\w+)`"))
def test_named_tests_exist(name):
    assert any(f"def {name}(" in file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))


def test_the_names_that_the_example_imports_exist():
    for module, names in re.findall(r"^from (meteor[\w.]*) import (.+)$", TEXT, re.MULTILINE):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name)


def test_make_knows_its_targets():
    assert shutil.which("make")
    subprocess.run(["make", "-n", "-C", str(ROOT), "demo", "test", "lint"], check=True, capture_output=True)
