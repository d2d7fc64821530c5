"""Data and models that several files look at, made once."""

from itertools import islice

import pytest

from meteor.synthetic.dataset import SyntheticDataset, write_dataset
from meteor.synthetic.models import TinyModels, make_tiny_models
from meteor.synthetic.scenes import Scene, SceneDealer
from meteor.synthetic.streams import random_stream


def _no_report(line: str) -> None:
    pass


@pytest.fixture(scope="session")
def scenes() -> list[Scene]:
    return list(islice(SceneDealer(random_stream(7, "test")), 160))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SyntheticDataset:
    return write_dataset(tmp_path_factory.mktemp("dataset"), num_scenes=24, num_held_out=16, seed=3)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Two steps of training: right in form, blind in content."""
    folder = tmp_path_factory.mktemp("models")
    return make_tiny_models(folder, train_steps=2, num_threads=1, report=_no_report)
