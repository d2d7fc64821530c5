"""One Ray session for all pipeline tests, and a small run on disk: generated images, models with random weights."""

import hashlib
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import ray

from meteor.assembly import Inputs
from meteor.config import RunSettings, resolve_paths
from meteor.runs.folder import Summary
from meteor.synthetic.dataset import write_dataset
from meteor.synthetic.models import make_tiny_models
from pipelines import cache_features, evaluate, finetune, pretrain
from pipelines.ray_parts.runtime import ray_session

# What benchmarks/kills.py uses as well.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def ray_once() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own deprecations and unclosed sockets
        with ray_session(RunSettings().runtime):
            yield
    assert not ray.is_initialized()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ and models/."""
    folder = tmp_path_factory.mktemp("small")
    write_dataset(folder / "data", num_scenes=12, num_held_out=8)
    make_tiny_models(folder / "models", train_steps=0, num_threads=1, report=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def tracking_database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow database for all tests: creating one takes seconds of migrations."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def small_run(folder: Path, small: Path, tracking_uri: str, **changes: Any) -> RunSettings:
    """Settings of a run in a folder, over the data and models of `small`."""
    stage = {"global_batch_size": 8, "micro_batch_size": 4, "max_length": 512, "zero_stage": 0}
    settings: dict[str, Any] = {
        "name": "small",
        "output": str(folder / "out"),
        "data": {
            "roots": {"": str(small / "data/images")},
            "pretrain": str(small / "data/pretrain.json"),
            "finetune": str(small / "data/finetune.json"),
            "evaluate": {"scenes": str(small / "data/evaluate.json")},
        },
        "slicing": {"resolution": 56, "max_slices": 2},
        "vision": {"path": str(small / "models/clip"), "dtype": "float32"},
        "cache": {"rows_per_file": 8},
        "projector": {"name": "meteor", "settings": {"k": 4, "state_size": 2}},
        "llm": {"path": str(small / "models/llm"), "dtype": "float32", "gradient_checkpointing": False},
        "pretrain": stage,
        "finetune": {**stage, "fraction": 0.5},
        "evaluate": {"max_new_tokens": 2, "limit": 8},
        "report": {"num_figures": 1},
        "runtime": {},
        "tracking": {"uri": tracking_uri, "experiment": folder.name},
    }
    for name, value in changes.items():
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
    return resolve_paths(RunSettings.model_validate(settings))


@pytest.fixture
def make_settings(small: Path, tmp_path: Path, tracking_database: str) -> Callable[..., RunSettings]:
    return partial(small_run, tmp_path, small, tracking_database)


class Chain:
    """Stages of one run that several tests read; each runs when a test first asks for it. Tests leave its folder as it is."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings

    @cached_property
    def encoded(self) -> Summary:
        return cache_features.run(Inputs(self.settings))

    @cached_property
    def pretrained(self) -> Summary:
        assert self.encoded
        return pretrain.run(Inputs(self.settings))

    @cached_property
    def finetuned(self) -> Summary:
        assert self.pretrained
        return finetune.run(Inputs(self.settings))

    @cached_property
    def evaluated(self) -> Summary:
        assert self.finetuned
        return evaluate.run(Inputs(self.settings))


@pytest.fixture(scope="session")
def chain(ray_once: None, small: Path, tracking_database: str, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(small_run(tmp_path_factory.mktemp("chain"), small, tracking_database))


@pytest.fixture
def encode(chain: Chain) -> Callable[..., Summary]:
    """Run cache_features over a copy of the chain's cache: what it holds starts no encoder, which takes seconds.

    With ``index=False`` the copy lacks the index, for runs that have their images elsewhere or must not know some.
    """

    def run(settings: RunSettings, *, index: bool = True) -> Summary:
        assert chain.encoded
        if not Path(settings.cache_root).exists():
            ignored = shutil.ignore_patterns(*([] if index else ["index"]))
            shutil.copytree(chain.settings.cache_root, settings.cache_root, ignore=ignored)
        return cache_features.run(Inputs(settings))

    return run


@pytest.fixture(scope="session")
def digest_of() -> Callable[[Path], dict[str, str]]:
    """Relative path -> content digest of every file below a folder."""

    def digest(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return digest
