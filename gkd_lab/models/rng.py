"""Random choices that depend on (seed, step, purpose) alone.

So a resumed run equals an uninterrupted one, a cell does not depend on who shares its pack, and cells of
one seed share prompts, coins and noise, which is what lets statistics pair them.
"""

import hashlib
import random

import torch
from torch import Tensor


def derive_seed(seed: int, step: int, purpose: str) -> int:
    """63 bits for a generator."""
    digest = hashlib.blake2b(f"{seed}:{step}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def is_on_policy(lmbda: float, seed: int, step: int) -> bool:
    """The coin of Algorithm 1: one draw per optimizer step, heads with probability lmbda.

    lmbda 0 never samples and 1 always does. For one seed and step a larger lmbda is heads whenever a
    smaller one is.
    """
    return random.Random(derive_seed(seed, step, "coin")).random() < lmbda


def draw_uniforms(seed: int, step: int, purpose: str, rows: int, tokens: int) -> Tensor:
    """Noise in [0, 1) for `rows` sequences, float64, (rows, tokens)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, step, purpose))
    return torch.rand(rows, tokens, generator=generator, dtype=torch.float64)


def draw_permutation(seed: int, epoch: int, size: int) -> list[int]:
    """Order of the rows in one pass over the data."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch, "order"))
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order
