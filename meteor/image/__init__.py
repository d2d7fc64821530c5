"""From image bytes to the pixels of its sub-images: decoding, slicing, resizing, token budgets."""
