"""Synthetic rows (source `made`), drawn by a random stream of (version, seed, split).

A prompt belongs to one split for every seed, so no seed's test row is another seed's train row.
"""

import hashlib
import random
from collections.abc import Callable, Iterator

from gkd_lab.tasks.task import Row, RowGenerator, Split

_SPLIT_BY_TENTH: dict[int, Split] = {0: "test", 1: "validation"}  # the other eight tenths are train
_MAX_REJECTED_DRAWS = 10_000

PairSampler = Callable[[random.Random], tuple[str, str]]
"""Draws one (prompt, target) pair."""


def assign_split(prompt: str) -> Split:
    """Return the split that a prompt's hash assigns it to: 80 % train, 10 % validation, 10 % test."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return _SPLIT_BY_TENTH.get(int.from_bytes(digest, "big") % 10, "train")


def build_generator(draw_pair: PairSampler, version: str) -> RowGenerator:
    """Return an endless RowGenerator of distinct rows that `draw_pair` draws, with this version."""
    return RowGenerator(lambda seed, split, _: draw_rows(draw_pair, version, seed, split), lambda _: version)


def draw_rows(
    draw_pair: PairSampler, version: str, seed: int, split: Split, *, split_by_prompt: bool = True
) -> Iterator[Row]:
    """Yield distinct rows of `split` without end. ValueError: no new row in 10,000 draws.

    `version` names the generator and its version; it keys the random stream together with seed and split.
    Without `split_by_prompt` every drawn prompt is kept: `draw_pair` draws for this split alone.
    """
    random_numbers = random.Random(f"{version}/{seed}/{split}")
    prompts: set[str] = set()
    rejected_draws = 0
    while rejected_draws < _MAX_REJECTED_DRAWS:
        prompt, target = draw_pair(random_numbers)
        if prompt in prompts or (split_by_prompt and assign_split(prompt) != split):
            rejected_draws += 1
            continue
        rejected_draws = 0
        prompts.add(prompt)
        yield Row(prompt, target, (target,))
    raise ValueError(f"{version} has only {len(prompts):,} different rows for the split {split!r}")
