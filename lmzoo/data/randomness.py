"""Random numbers without state: hashes of a seed and of what they are for."""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(numbers: np.ndarray) -> np.ndarray:
    """Hashes uint64 to uint64, one to one.

    Reference: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators", the mix of SplitMix64.
    """
    numbers = numbers + GOLDEN
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return numbers ^ numbers >> np.uint64(31)


def uniform(seeds: np.ndarray, purpose: int, size: int) -> np.ndarray:
    """Numbers from [0, 1), float64 [B, size], that depend on the seeds [B] and on what they are for alone."""
    keys = mix(seeds ^ mix(np.full(1, purpose, np.uint64)))
    return (mix(keys[:, None] + np.arange(size, dtype=np.uint64) * GOLDEN) >> np.uint64(11)) * 2.0**-53
