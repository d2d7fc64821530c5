"""Runs on disk: identity and folder of a stage, its pinned versions, its metrics, and its MLflow run."""
