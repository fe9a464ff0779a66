"""Made chain sums, GSM8K and SVAMP rows, and the rule that judges a solution."""

import re

import pytest

from gkd_lab.tasks import get_task, load_rows
from gkd_lab.tasks.arithmetic import is_correct, parse_row

ARITHMETIC = get_task("arithmetic")


@pytest.mark.parametrize(
    ("solution", "reference", "correct"),
    [
        ("8 17 #### 17", "#### 17", True),
        ("#### 1,234", "#### 1234", True),  # commas are removed
        ("#### -3", "#### -3", True),
        ("#### 2.5", "#### 2.5", True),
        ("#### 5 then #### 6", "#### 5", True),  # the first match counts
        ("#### 5 then #### 6", "#### 6", False),
        ("#### 18.0", "#### 18", False),  # compared as strings
        ("#### 18.", "#### 18", False),
        ("#### $18", "#### 18", False),
        ("####18", "#### 18", False),  # the space is part of the rule
        ("#### minus 3", "#### -3", False),
        ("the answer is 18", "#### 18", False),
        ("", "#### 18", False),
        ("#### 18", "18", False),
        ("no number", "none here either", False),  # two missing answers are not an agreement
    ],
)
def test_is_correct_follows_the_gsm8k_rule(solution: str, reference: str, correct: bool) -> None:
    assert is_correct(solution, reference) is correct


def test_made_rows_are_golden() -> None:
    first, second = load_rows(ARITHMETIC, "made", split="train", count=2)
    assert (first.prompt, first.target) == (
        "8 + 5 + 8 + 1 + 1 + 7 + 4 + 6 + 3 + 9 =",
        "5 13 8 21 1 22 1 23 7 30 4 34 6 40 3 43 9 52 #### 52",
    )
    assert (second.prompt, second.target) == (
        "9 + 2 + 6 + 1 + 5 + 1 + 4 + 7 + 3 + 1 =",
        "2 11 6 17 1 18 5 23 1 24 4 28 7 35 3 38 1 39 #### 39",
    )


def test_every_made_solution_adds_up_and_ends_in_its_answer() -> None:
    for row in load_rows(ARITHMETIC, "made", split="test", count=500):
        digits = [int(text) for text in re.findall(r"\d+", row.prompt)]
        steps, answer = row.target.split(" #### ")
        numbers = [int(step) for step in steps.split()]
        assert numbers[::2] == digits[1:]
        assert numbers[1::2] == [sum(digits[:end]) for end in range(2, len(digits) + 1)]
        assert int(answer) == sum(digits)
        assert 6 <= len(digits) <= 10
        assert all(1 <= digit <= 9 for digit in digits)
        assert row.references == (row.target,)


def test_a_gsm8k_row_loses_its_calculator_marks_only() -> None:
    row = parse_row({"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 1,024"})
    assert row.prompt == "How many?"
    assert row.target == "48/2 = 24 clips.\n#### 1,024"
    assert is_correct("#### 1024", row.references[0])


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        ("51", "#### 51"),
        (51, "#### 51"),
        (51.0, "#### 51"),
        (2.5, "#### 2.5"),
        (-4, "#### -4"),
        ("2.20906e+07", "#### 22090600"),
        ("#### 7", "#### 7"),
    ],
)
def test_a_bare_number_becomes_a_solution(answer: object, target: str) -> None:
    assert parse_row({"question": "How many?", "answer": answer}).target == target


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"question": "Q"}, "no field 'answer'"),
        ({"answer": "5"}, "no field 'question'"),
        ({"question": "Q", "answer": "about five"}, "'#### number'"),
        ({"question": "Q", "answer": " "}, "field 'answer' is empty"),
        ({"question": "Q", "answer": None}, "got NoneType"),
        ({"question": "Q", "answer": True}, "got bool"),
    ],
)
def test_an_invalid_row_is_refused_with_the_reason(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_row(raw)
