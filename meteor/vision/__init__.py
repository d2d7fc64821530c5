"""Frozen vision encoder: patch features of one layer, and how important each patch is to the tower."""
