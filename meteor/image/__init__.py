"""Image bytes to pixels of sub-images: decoding, slicing, resizing; and token budgets."""
