"""One Ray session for all pipeline tests, and a small run on disk: generated images, models with random weights."""

import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from meteor.config import RunSettings, resolve_paths
from meteor.synthetic.dataset import write_dataset
from meteor.synthetic.models import make_tiny_models
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


@pytest.fixture
def make_settings(small: Path, tmp_path: Path, tracking_database: str) -> Callable[..., RunSettings]:
    def make(**changes: Any) -> RunSettings:
        stage = {"global_batch_size": 8, "micro_batch_size": 4, "max_length": 512, "zero_stage": 0}
        settings: dict[str, Any] = {
            "name": "small",
            "output": str(tmp_path / "out"),
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
            "tracking": {"uri": tracking_database, "experiment": tmp_path.name},
        }
        for name, value in changes.items():
            settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
        return resolve_paths(RunSettings.model_validate(settings))

    return make


@pytest.fixture(scope="session")
def digest_of() -> Callable[[Path], dict[str, str]]:
    """Relative path -> content digest of every file below a folder."""

    def digest(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return digest
