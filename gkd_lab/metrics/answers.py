"""The answer of a step-by-step solution: OpenAI's grade-school-math rule, and lm-eval's looser one.

What counts as right is a matter of definition, so each rule is a metric of its own name.
"""

import re

ANSWER_PATTERN = re.compile(r"#### (\-?[0-9\.\,]+)")
LAST_NUMBER_PATTERN = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_FINAL_PERIOD = re.compile(r"\.$")


def extract_answer(text: str) -> str | None:
    """The first `#### number` of `text`, commas removed; None if there is none.

    This is `extract_answer` of openai/grade-school-math, where None is `[invalid]`.
    """
    match = ANSWER_PATTERN.search(text)
    return match.group(1).replace(",", "") if match else None


def extract_last_number(text: str) -> str | None:
    """What lm-eval's `gsm8k` (version 3) finds by `flexible-extract`: the last number, as it is written.

    Two or more of `$ 0-9 . ,` in a row are a number to it, `...` too.
    """
    found = [match.group().strip() for match in LAST_NUMBER_PATTERN.finditer(text)]
    return found[-1] if found else None


def normalize_answer(text: str) -> str:
    """What lm-eval's `gsm8k` compares: no commas, no dollar signs, nothing up to `#### `, no last stop.

    Its own `(?s).*#### ` takes minutes for a long document without that mark.
    """
    answer = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return _FINAL_PERIOD.sub("", answer).lower()
