"""Benchmarks of the paper's tables, NLVR, and files in LLaVA's own forms, with their prompts and metrics."""

from meteor.evaluation.benchmarks.folder import Folder
from meteor.evaluation.benchmarks.registry import BENCHMARKS, Benchmark

__all__ = ["BENCHMARKS", "Benchmark", "Folder"]
