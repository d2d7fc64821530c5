"""Answers in, scores out."""
