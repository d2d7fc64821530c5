"""Experiment tracking in MLflow."""

from meteor.tracking.client import ChildRun, RunEnd, Tracker, experiment_page
from meteor.tracking.names import mlflow_name, public_uri

__all__ = ["ChildRun", "RunEnd", "Tracker", "experiment_page", "mlflow_name", "public_uri"]
