"""A database that MLflow has brought to its present form, which takes seconds, for copies."""

import pytest

from meteor.tracking import Tracker


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory):
    file = tmp_path_factory.mktemp("mlflow") / "template.db"
    Tracker(f"sqlite:///{file}", "template")
    return file
