"""Rows put with worked examples before them, and with their calculator marks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.tasks import check_row_format, get_task, load_rows
from gkd_lab.tasks.arithmetic import EXEMPLARS, is_correct, parse_row, parse_row_with_marks

ARITHMETIC = get_task("arithmetic")
ROW = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"}


def load_row(folder: Path, **form: Any) -> list[Any]:
    (folder / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    return load_rows(ARITHMETIC, "folder", path=folder, split="test", **form)


def test_four_worked_examples_precede_the_question(tmp_path: Path) -> None:
    (row,) = load_row(tmp_path, shots=4)
    parts = row.prompt.split("\n\n")
    assert [part.splitlines()[0] for part in parts[:4]] == [
        f"Q: {exemplar['question']}" for exemplar in EXEMPLARS
    ]
    assert parts[0].endswith("So there must have been 21 - 15 = 6.\n#### 6")
    assert parts[4] == "Q: How many?\nA:"
    assert (row.target, row.references) == ("48/2 = 24 clips.\n#### 24", ("48/2 = 24 clips.\n#### 24",))


def test_fewer_shots_are_the_first_ones_and_no_shots_keep_the_question(tmp_path: Path) -> None:
    (one_shot,), (no_shot,) = load_row(tmp_path, shots=1), load_row(tmp_path)
    assert re.findall(r"^Q: (\w+)", one_shot.prompt, re.MULTILINE) == ["There", "How"]
    assert no_shot.prompt == "How many?"


def test_calculator_marks_are_kept_in_targets_and_examples(tmp_path: Path) -> None:
    (row,) = load_row(tmp_path, shots=1, calculator_marks=True)
    assert row.target == ROW["answer"] == row.references[0]
    assert "21 - 15 = <<21-15=6>>6" in row.prompt
    (plain,) = load_row(tmp_path, shots=1)
    assert "<<" not in plain.prompt + plain.target


def test_every_worked_example_is_solved_by_its_own_steps() -> None:
    for raw in EXEMPLARS:
        steps = re.findall(r"<<(\d+)([+-])(\d+)=(\d+)>>(\d+)", parse_row_with_marks(raw).target)
        for first, sign, second, marked, written in steps:
            result = int(first) + (int(second) if sign == "+" else -int(second))
            assert str(result) == marked == written
        assert is_correct(parse_row(raw).target, f"#### {steps[-1][3]}")


def test_made_rows_may_have_shots_too() -> None:
    (row,) = load_rows(ARITHMETIC, "made", split="test", count=1, shots=2)
    (plain,) = load_rows(ARITHMETIC, "made", split="test", count=1)
    assert row.prompt.endswith(f"Q: {plain.prompt}\nA:")
    assert row.target == plain.target


@pytest.mark.parametrize(
    ("task", "kind", "form", "message"),
    [
        (
            "arithmetic",
            "folder",
            {"shots": 5},
            "data.shots: 5",
        ),
        ("translation", "folder", {"shots": 1}, "leave `shots` out"),
        ("arithmetic", "made", {"calculator_marks": True}, "made rows of arithmetic"),
        ("translation", "hub", {"calculator_marks": True}, "hub rows of translation"),
    ],
)
def test_an_impossible_row_format_is_refused(
    task: str, kind: str, form: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_row_format(get_task(task), kind, **form)
