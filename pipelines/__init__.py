"""Stages on Ray: each is `python -m pipelines.<stage> --run <yaml>`."""
