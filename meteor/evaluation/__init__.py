"""Evaluation: questions of benchmarks, a model's answers, and their scores."""
