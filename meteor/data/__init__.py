"""Samples, the URIs of their images, the order of training, and batches."""
