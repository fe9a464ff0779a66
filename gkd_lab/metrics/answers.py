"""Exact match, and accuracy of the final answer of a step-by-step solution.

OpenAI's grade-school-math rule, lm-eval's more tolerant one and equality as numbers are three metrics with
names of their own.
"""

import re
from fractions import Fraction
from statistics import fmean

from gkd_lab.metrics.score import MetricInput, Score

ANSWER_PATTERN = re.compile(r"#### (\-?[0-9\.\,]+)")
LAST_NUMBER_PATTERN = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
NUMBER_PATTERN = re.compile(
    r"(?:(?<![0-9])(?<![0-9]\s)[-−]\s?)?[$€£]?\s?"  # a sign, unless it stands behind a number: 20-29
    r"(?:[0-9]{1,3}(?:[ \u00a0\u202f][0-9]{3})+(?![0-9])|[0-9][0-9,]*|(?=\.[0-9]))"
    r"(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,2}(?![0-9])|/[0-9]+)?"
)
MAX_NUMBER_CHARACTERS = 4300
"""Of a number that is read, as Python converts no longer one: a model that repeats a digit has no answer."""
_FINAL_PERIOD = re.compile(r"\.$")


def extract_answer(text: str) -> str | None:
    """Return the first `#### number` of `text` without commas; None if there is none.

    This is `extract_answer` of openai/grade-school-math, where None is `[invalid]`.
    """
    match = ANSWER_PATTERN.search(text)
    return match.group(1).replace(",", "") if match else None


def extract_last_number(text: str) -> str | None:
    """Return the last number as it is written, or None: `flexible-extract` of lm-eval's `gsm8k` 3.

    Two or more characters of `$ 0-9 . ,` in a row count as a number, even `...`.
    """
    numbers = [match.group().strip() for match in LAST_NUMBER_PATTERN.finditer(text)]
    return numbers[-1] if numbers else None


def normalize_answer(text: str) -> str:
    """Return the lower-case text after the last `#### `, without commas, dollar signs and final period.

    This is the rule of lm-eval's `gsm8k`, whose pattern `(?s).*#### ` takes minutes on a long document
    without that mark.
    """
    answer = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return _FINAL_PERIOD.sub("", answer).lower()


def score_accuracy(inputs: MetricInput) -> Score:
    """Return a Score: the percentage of solutions whose `#### number` equals a reference's (GSM8K's rule)."""
    answers = [extract_answer(text) for text in inputs.predictions]
    accepted = [{extract_answer(text) for text in texts} - {None} for texts in inputs.references]
    hits = [100.0 * (answer in valid) for answer, valid in zip(answers, accepted, strict=True)]
    rates = {
        "extraction_failure_rate": fmean(answer is None for answer in answers),
        "reference_without_answer_rate": fmean(not valid for valid in accepted),
    }
    return Score(fmean(hits), hits, f"accuracy|rule:gsm8k|answer:{ANSWER_PATTERN.pattern}", rates)


def score_flexible_accuracy(inputs: MetricInput) -> Score:
    """Return a Score: the percentage of solutions whose last number is a reference's answer (lm-eval)."""
    answers = [extract_last_number(text) for text in inputs.predictions]
    hits = [
        100.0 * (answer is not None and normalize_answer(answer) in set(map(normalize_answer, texts)))
        for answer, texts in zip(answers, inputs.references, strict=True)
    ]
    rates = {"flexible_extraction_failure_rate": fmean(answer is None for answer in answers)}
    signature = (
        f"accuracy_flexible|rule:lm-eval-gsm8k-3-flexible-extract|answer:{LAST_NUMBER_PATTERN.pattern}"
    )
    return Score(fmean(hits), hits, signature, rates)


def extract_number(text: str) -> Fraction | None:
    """Return the last number after the first `####`, or of a text without that mark; None if there is none.

    Currency, per cent, thousands separators (comma or space) and a final period are no part of it:
    `#### $1,029.00` is 1029 and `29 %` is 29. `1e3` is 1000 and `3/4` is 0.75; digits are those of ASCII.
    """
    numbers = NUMBER_PATTERN.findall(text.partition("####")[2] or text)
    if not numbers:
        return None
    numerator, _, denominator = re.sub(r"[,\s$€£]", "", numbers[-1].replace("−", "-")).partition("/")
    if max(len(numerator), len(denominator)) > MAX_NUMBER_CHARACTERS:
        return None
    divisor = Fraction(denominator or 1)
    return Fraction(numerator) / divisor if divisor else None


def score_numeric_accuracy(inputs: MetricInput) -> Score:
    """Return a Score: the percentage of solutions whose answer is the number of a reference's answer."""
    answers = [extract_number(text) for text in inputs.predictions]
    accepted = [{extract_number(text) for text in texts} - {None} for texts in inputs.references]
    hits = [100.0 * (answer in valid) for answer, valid in zip(answers, accepted, strict=True)]
    rates = {"numeric_extraction_failure_rate": fmean(answer is None for answer in answers)}
    signature = f"accuracy_numeric|rule:equal-numbers|answer:{NUMBER_PATTERN.pattern}"
    return Score(fmean(hits), hits, signature, rates)


def score_exact_match(inputs: MetricInput) -> Score:
    """Return a Score: the percentage of predictions equal to a reference, outer spaces aside."""
    hits = [
        100.0 * (prediction.strip() in {text.strip() for text in texts})
        for prediction, texts in zip(inputs.predictions, inputs.references, strict=True)
    ]
    return Score(fmean(hits), hits, "exact_match|strip:yes|case:mixed")
