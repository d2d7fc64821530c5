"""The frozen vision encoder: patch features of one layer, and where its class token looks."""
