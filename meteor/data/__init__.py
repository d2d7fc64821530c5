"""Samples, their images' places, the order of training, and batches."""
