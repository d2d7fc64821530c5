"""Frozen vision encoder: patch features of one layer, and the class token's attention."""
