"""The mixture of instructions: known kinds in train and validation, new ones in test; and real rows."""

import re
from math import gcd, lcm

import pytest

from gkd_lab.tasks import get_task, load_rows
from gkd_lab.tasks.instruction import HELD_IN, HELD_OUT, REASONING_GYM_VERSION, check_reasoning_gym, parse_row

INSTRUCTION = get_task("instruction")


def texts(split: str, count: int = 200) -> list[tuple[str, str]]:
    pytest.importorskip("reasoning_gym", reason="the extra `reasoning` is not installed")
    rows = load_rows(INSTRUCTION, "made", split=split, count=count)  # type: ignore[arg-type]
    return [(row.prompt, row.target) for row in rows]


GOLDEN = {
    "train": [
        (
            "Owen is married to Rain. They have a child called Daniel. What is Daniel to Owen? "
            "Respond only with the word that describes their relationship.",
            "son",
        ),
        (
            "Find the Greatest Common Divisor (GCD) of these numbers: 14, 32. "
            "Give only the GCD as your final answer.",
            "2",
        ),
    ],
    "test": [
        ("Calculate 1 - 7.", "-6"),
        ("Find the Least Common Multiple (LCM) of these numbers: 2, 14", "14"),
    ],
}


def test_made_rows_are_golden() -> None:
    assert texts("train", 2) == GOLDEN["train"]
    assert texts("test", 2) == GOLDEN["test"]


def is_multiple(prompt: str) -> bool:
    return "Least Common Multiple" in prompt


def test_the_kinds_of_test_are_held_out_of_train_and_validation() -> None:
    assert not HELD_IN.keys() & HELD_OUT.keys()
    assert {is_multiple(prompt) for prompt, _ in texts("test")} == {True, False}
    for split in ("train", "validation"):
        assert not any(is_multiple(prompt) for prompt, _ in texts(split))
        assert not any(
            re.match(r"(Calculate|What is -?\d|Solve|Compute|Evaluate)", p) for p, _ in texts(split)
        )


def test_answers_are_right() -> None:
    checked = 0
    for split, word, rule in (("train", "Divisor", gcd), ("test", "Multiple", lcm)):
        for prompt, answer in texts(split):
            if word in prompt:
                assert int(answer) == rule(*map(int, re.findall(r"\d+", prompt)))
                checked += 1
    assert checked > 60


def test_prompts_are_short_and_one_line() -> None:
    for split in ("train", "test"):
        for prompt, answer in texts(split):
            assert len(prompt) < 200
            assert "\n" not in prompt + answer


def test_flan_and_bbh_rows_are_parsed_equally() -> None:
    flan = parse_row({"inputs": " Is it? ", "targets": "yes", "task": "bool_q_10templates"})
    assert flan == parse_row({"task": "boolean_expressions", "question": "Is it?", "answer": "yes"})
    assert (flan.prompt, flan.references) == ("Is it?", ("yes",))


def test_choices_follow_the_question_as_in_mmlu() -> None:
    raw = {"subject": "algebra", "question": "Which?", "choices": ["0", "1"], "answer": "B"}
    assert parse_row(raw).prompt == "Which?\nA. 0\nB. 1\nAnswer:"
    assert parse_row(raw).target == "B"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"inputs": "Q"}, "no field 'targets'"),
        ({"prompt": "Q"}, "no field 'question'"),
        ({"question": "Q", "answer": "E", "choices": ["a", "b"]}, "A, B, got 'E'"),
        ({"question": "Q", "answer": "A", "choices": "a"}, "field 'choices' must"),
    ],
)
def test_an_invalid_row_is_refused_with_the_reason(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_row(raw)


def test_another_release_of_reasoning_gym_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gkd_lab.tasks.instruction.version", lambda package: "0.1.19")
    message = rf"{re.escape(REASONING_GYM_VERSION)} .*0\.1\.19.*pip install"
    with pytest.raises(ValueError, match=message):
        check_reasoning_gym()
