"""Images, questions and tiny models generated from a seed, so that demo and tests need no download."""
