"""Samples, their pictures' places, the order of training, and batches."""
