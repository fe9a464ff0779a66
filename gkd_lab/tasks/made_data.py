"""What all made sources share: splits by a hash of the prompt, rows keyed by (source, seed, split).

A prompt belongs to one split whatever the seed, so no seed's test row is another seed's train row.
"""

import hashlib
import random
from collections.abc import Callable, Iterator

from gkd_lab.tasks.task import MadeSource, Row, Split

_SPLIT_BY_TENTH: dict[int, Split] = {0: "test", 1: "validation"}  # the other eight are train
_MAX_REJECTED_DRAWS = 10_000


def assign_split(prompt: str) -> Split:
    """The one split `prompt` belongs to: 80 % train, 10 % validation, 10 % test."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return _SPLIT_BY_TENTH.get(int.from_bytes(digest, "big") % 10, "train")


PairSampler = Callable[[random.Random], tuple[str, str]]
"""Makes one (prompt, target) pair from a generator."""


def build_generator(draw: PairSampler, version: str) -> MadeSource:
    """An endless source of distinct rows."""
    return MadeSource(lambda seed, split, _: draw_rows(draw, version, seed, split), lambda _: version)


def draw_rows(
    draw: PairSampler,
    source: str,
    seed: int,
    split: Split,
    *,
    shared: bool = True,
) -> Iterator[Row]:
    """Endless distinct rows of `split`.

    `source` names the generator and its version: it keys the random stream with seed and split. Not
    `shared`: what is drawn for this split is never drawn for another, so every prompt is kept.
    """
    random_numbers = random.Random(f"{source}/{seed}/{split}")
    seen: set[str] = set()
    wasted = 0
    while wasted < _MAX_REJECTED_DRAWS:
        prompt, target = draw(random_numbers)
        if prompt in seen or (shared and assign_split(prompt) != split):
            wasted += 1
            continue
        wasted = 0
        seen.add(prompt)
        yield Row(prompt, target, (target,))
    raise ValueError(f"{source} has only {len(seen):,} different rows for the split {split!r}")
