"""Images, questions and tiny models made from a seed, so that demo and tests need no download."""
