"""The answer of a step-by-step solution, by OpenAI's grade-school-math rule and no other."""

import re

ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


def extract_answer(text: str) -> str | None:
    """The first `#### number` of `text`, commas removed; None if there is none."""
    match = ANSWER.search(text)
    return match.group(1).replace(",", "") if match else None
