"""Keyed random streams, each a function of (seed, step, purpose), and the on-policy coin.

So a resumed run equals an uninterrupted one, a cell's result does not depend on the other cells of its pack,
and cells of one seed share prompts, coins and noise, so that statistics can pair them.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def derive_seed(seed: int, step: int, purpose: str) -> int:
    """Return a 63-bit seed for a random generator, the hash of (seed, step, purpose)."""
    digest = hashlib.blake2b(f"{seed}:{step}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def is_on_policy(lmbda: float, seed: int, step: int) -> bool:
    """Decide by coin whether this optimizer step trains on the student's own samples; True with chance lmbda.

    The coin of Algorithm 1, a function of (seed, step): never for 0, always for 1. With one seed, a step
    that is on-policy for one lmbda is on-policy for every larger one.
    """
    return random.Random(derive_seed(seed, step, "coin")).random() < lmbda


def draw_uniforms(seed: int, step: int, purpose: str, rows: int, tokens: int) -> Tensor:
    """Return sampling noise in [0, 1), a function of (seed, step, purpose): float64, (rows, tokens)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, step, purpose))
    return torch.rand(rows, tokens, generator=generator, dtype=torch.float64)


def draw_permutation(seed: int, epoch: int, size: int) -> list[int]:
    """Return the row indices 0 to size - 1 in a random order that depends on (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch, "order"))
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """Leave the random streams of torch, on CPU and `device`, and of Python as they are before the block.

    So that what is only measured draws the dropout of the training step, and takes none from it.
    """
    state = random.getstate()
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        random.setstate(state)
