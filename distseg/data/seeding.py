"""Random numbers as pure functions of what they are for, so that no loader, rank or restart carries generator state."""

import hashlib

import numpy as np


def stable_hash(*parts: int | str) -> int:
    """128 bits that depend on `parts` alone: the same in every process and on every machine, unlike `hash()`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), "little")


def generator(*parts: int | str) -> np.random.Generator:
    """A fresh generator for one purpose, for instance `generator(seed, "noise", sample_id)`."""
    return np.random.Generator(np.random.PCG64(stable_hash(*parts)))
