"""Made reviews with tags and a score (tasks classification, tagging and scoring).

Each clause has a value: `not` negates its opinion, `very` doubles it, and the clause after `but` counts
twice. The score is the sum: here -1 + 2 * (2 * 2) = 7. Words are separated by spaces, one tag each.
    text   the soup was not good , we came on Monday , but the staff was very lovely .
    tags   O THING O O BLAME O O O O O O O O THING O O PRAISE O
    score  7
Rows of classification have the sign of the score as the label, rows of scoring a quarter of it.
"""

import random
from dataclasses import dataclass

# fmt: off
THINGS = (
    "soup", "bread", "coffee", "cake", "room", "bed", "view", "staff", "price", "garden", "music", "light",
    "table", "menu", "wine", "fish",
)
OPINION_VALUES = {
    "good": 1, "nice": 1, "fine": 1, "fresh": 1, "lovely": 2, "great": 2, "superb": 2,
    "poor": -1, "dull": -1, "stale": -1, "weak": -1, "awful": -2, "dirty": -2, "dreadful": -2,
}
FACTORS = {"": 1, "quite": 1, "very": 2, "truly": 2, "not": -1, "hardly": -1}
ASIDES = (
    "we came on Monday", "it was late", "the street was full", "they close at ten", "it is near the station",
    "we were two",
)
# fmt: on
TAGS = ("O", "THING", "PRAISE", "BLAME")


@dataclass(frozen=True)
class Review:
    """Words of a review, the tag of each word, and the sum of its clauses' values."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    score: int

    @property
    def text(self) -> str:
        """Words joined by spaces."""
        return " ".join(self.words)


def draw_review(random_numbers: random.Random) -> Review:
    """Return a random Review of 2 to 4 clauses, one possibly after `but`, some followed by an aside."""
    words, tags, score = list[str](), list[str](), 0
    count = random_numbers.randint(2, 4)
    but_position = random_numbers.randint(1, 2 * count)  # no `but` where there is no such clause
    for number in range(count):
        if number:
            conjunction = [",", "but"] if number == but_position else [","]
            words, tags = words + conjunction, tags + ["O"] * len(conjunction)
        clause_words, clause_tags, value = _draw_clause(random_numbers)
        words, tags = words + clause_words, tags + clause_tags
        score += 2 * value if number == but_position else value
        if random_numbers.random() < 0.3:
            aside = [",", *random_numbers.choice(ASIDES).split()]
            words, tags = words + aside, tags + ["O"] * len(aside)
    return Review((*words, "."), (*tags, "O"), score)


def _draw_clause(random_numbers: random.Random) -> tuple[list[str], list[str], int]:
    """Return (words, tags, value) of one random clause."""
    thing, opinion = random_numbers.choice(THINGS), random_numbers.choice(list(OPINION_VALUES))
    factor = random_numbers.choice(list(FACTORS))
    value = FACTORS[factor] * OPINION_VALUES[opinion]
    modifier = [factor] if factor else []
    tags = ["O", "THING", "O", *("O" for _ in modifier), "PRAISE" if value > 0 else "BLAME"]
    return ["the", thing, "was", *modifier, opinion], tags, value
