"""Runs on disk: what makes two stages the same, a stage's folder, the versions it is pinned to, its metrics, MLflow's log."""
