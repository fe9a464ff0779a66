"""The GSM8K rule on solutions whose verdict is known, and where the looser rule differs."""

from fractions import Fraction

import pytest

from gkd_lab.metrics import extract_answer, score
from gkd_lab.metrics.answers import extract_number
from gkd_lab.tasks.arithmetic import is_correct

# (solution, reference, right by the GSM8K rule, right by lm-eval's flexible-extract); the first column of
# verdicts follows from `extract_answer` and `is_correct` of openai/grade-school-math/dataset.py.
VERDICTS = [
    ("48/2=24\n48+24=72\n#### 72", "#### 72", True, True),
    ("#### 72 clips", "He sold 72.\n#### 72", True, True),
    ("#### 73", "#### 72", False, False),
    ("#### 1,080", "#### 1080", True, True),
    ("#### 1080", "#### 1,080", True, True),
    ("#### 109,200,000", "#### 109,200,000", True, True),
    ("#### 1.080", "#### 1080", False, False),
    ("#### -3", "#### -3", True, True),
    ("#### 3", "#### -3", False, False),
    ("#### - 3", "#### -3", False, False),
    ("#### 0.5", "#### 0.5", True, True),
    ("#### .5", "#### 0.5", False, False),
    ("#### 5.0", "#### 5", False, False),
    ("#### 5.", "#### 5", False, True),
    ("#### 5,", "#### 5", True, True),
    ("#### $5", "#### 5", False, True),
    ("#### 5 dollars, not 6", "#### 5", True, False),
    ("####5", "#### 5", False, True),
    ("####  5", "#### 5", False, True),
    ("### 5", "#### 5", False, True),
    ("##### 5", "#### 5", True, True),
    ("#### five", "#### 5", False, False),
    ("The answer is 5.", "#### 5", False, True),
    ("The answer is 5", "#### 5", False, True),
    ("#### 4\n#### 5", "#### 5", False, True),
    ("#### 5\n#### 4", "#### 5", True, False),
    ("5\n#### x #### 5", "#### 5", True, True),
    ("#### 1/2", "#### 1", True, False),
    ("#### 12%", "#### 12", True, True),
    ("#### 1e3", "#### 1000", False, False),
    ("#### ５", "#### 5", False, False),
    ("", "#### 5", False, False),
    ("no number at all", "#### 5", False, False),
    ("####", "#### 5", False, False),
    ("<<2+3=5>>5 #### 5", "<<2+3=5>>5\n#### 5", True, True),
]


@pytest.mark.parametrize(("solution", "reference", "right", "flexible"), VERDICTS)
def test_answers_are_judged_by_the_two_rules(
    solution: str, reference: str, right: bool, flexible: bool
) -> None:
    assert is_correct(solution, reference) is right
    assert score("accuracy", [solution], [[reference]]).value == 100 * right
    assert score("accuracy_flexible", [solution], [[reference]]).value == 100 * flexible


def test_all_solutions_as_one_evaluation() -> None:
    solutions, references = [row[0] for row in VERDICTS], [[row[1]] for row in VERDICTS]
    scored = score("accuracy", solutions, references)
    assert scored.value == pytest.approx(100 * sum(row[2] for row in VERDICTS) / len(VERDICTS))
    missing = sum(extract_answer(text) is None for text in solutions)
    assert scored.rates["extraction_failure_rate"] == pytest.approx(missing / len(VERDICTS))
    assert 0 < missing < len(VERDICTS)


def test_signatures_contain_the_rule_and_its_pattern() -> None:
    strict, loose = (score(name, ["1"], [["#### 1"]]) for name in ("accuracy", "accuracy_flexible"))
    assert strict.signature == r"accuracy|rule:gsm8k|answer:#### (\-?[0-9\.\,]+)"
    assert loose.signature.startswith("accuracy_flexible|rule:lm-eval-gsm8k-3-flexible-extract|answer:")
    assert (strict.value, loose.value) == (0, 100)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("29.", 29),
        ("#### 29", 29),
        ("29.0000", 29),
        ("1,234.50", 1234.5),
        ("-0", 0),
        ("29 %", 29),
        ("$ -3", -3),
        ("-$3", -3),
        ("−3", -3),
        ("x=-4", -4),
        ("20-29", 29),
        ("5 - 2", 2),
        ("1e3", 1000),
        ("7.5e-2", 0.075),
        ("3/4", 0.75),
        ("7/0", None),
        ("1 000", 1000),
        ("1\u202f000", 1000),
        ("1 000 000.5", 1000000.5),
        ("½", None),
        ("٣", None),
        ("####", None),
        ("3" * 5000, None),
        ("3/" + "7" * 5000, None),
    ],
)
def test_a_number_is_read_as_it_is_written(text: str, number: float | None) -> None:
    assert extract_number(text) == (None if number is None else Fraction(str(number)))


@pytest.mark.parametrize(
    ("solution", "reference", "is_equal"),
    [
        ("#### $29.00", "#### 29", True),
        ("so it is $1,029.", "#### 1029", True),
        ("#### -3", "#### 3", False),
        ("#### 0.50", "#### .5", True),
        ("#### 30", "#### 29", False),
        ("28 apples #### 29 apples", "#### 29", True),
        ("no number", "#### 29", False),
        ("...", "#### 29", False),
    ],
)
def test_numbers_are_equal_however_they_are_written(solution: str, reference: str, is_equal: bool) -> None:
    result = score("accuracy_numeric", [solution], [[reference]])
    assert result.value == 100 * is_equal and result.signature.startswith(
        "accuracy_numeric|rule:equal-numbers"
    )
