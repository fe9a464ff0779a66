"""Made reviews with a rule that a small classifier can learn: what each clause says, and how much it counts.

    the soup was not good , we came on Monday , but the staff was very lovely .

`not` turns an opinion round, `very` doubles it, and what follows `but` counts twice: -1 + 2 * 4 = 7.
Words are apart, so that each is a token of a word tokenizer and has a tag.
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
    """A review's words, the tag of each, and the sum of what its clauses say."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    score: int

    @property
    def text(self) -> str:
        return " ".join(self.words)


def draw_review(random_numbers: random.Random) -> Review:
    """2 to 4 clauses, of which one may follow `but`, and an aside now and then."""
    words, tags, score = list[str](), list[str](), 0
    count = random_numbers.randint(2, 4)
    turn = random_numbers.randint(1, 2 * count)
    for number in range(count):
        if number:
            joint = [",", "but"] if number == turn else [","]
            words, tags = words + joint, tags + ["O"] * len(joint)
        clause, its_tags, value = _draw_clause(random_numbers)
        words, tags = words + clause, tags + its_tags
        score += 2 * value if number == turn else value
        if random_numbers.random() < 0.3:
            aside = [",", *random_numbers.choice(ASIDES).split()]
            words, tags = words + aside, tags + ["O"] * len(aside)
    return Review((*words, "."), (*tags, "O"), score)


def _draw_clause(random_numbers: random.Random) -> tuple[list[str], list[str], int]:
    thing, opinion = random_numbers.choice(THINGS), random_numbers.choice(list(OPINION_VALUES))
    factor = random_numbers.choice(list(FACTORS))
    value = FACTORS[factor] * OPINION_VALUES[opinion]
    modifier = [factor] if factor else []
    tags = ["O", "THING", "O", *("O" for _ in modifier), "PRAISE" if value > 0 else "BLAME"]
    return ["the", thing, "was", *modifier, opinion], tags, value
