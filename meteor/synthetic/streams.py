"""Independent random streams of one seed, by name: drawing more from a stream never changes another."""

import zlib

import numpy as np


def random_stream(seed: int, name: str, index: int = 0) -> np.random.Generator:
    """Make a random generator that depends on all three arguments and nothing else."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), index])
