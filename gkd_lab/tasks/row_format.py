"""How a row is put to a model: worked examples before the question, calculator marks kept or left out."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from gkd_lab.tasks.task import Row, Task


def check_row_format(task: Task, kind: str, *, shots: int = 0, calculator_marks: bool = False) -> None:
    """ValueError, with the nearest that there is, if the rows of `task` have no such form."""
    most = len(task.exemplars)
    if shots not in range(most + 1):
        there = f"{most}: 0 to {most} can be had" if most else "none: leave `shots` out"
        raise ValueError(f"data.shots: {shots} is not valid: worked examples of {task.name} are {there}")
    if calculator_marks and (kind == "made" or task.parse_row_with_marks is None):
        raise ValueError(
            f"data.calculator_marks: {kind} rows of {task.name} have no marks such as <<48/2=24>>; rows of a "
            "folder or hub data set in GSM8K's form have them (task arithmetic)"
        )


def build_row_parser(task: Task, calculator_marks: bool) -> Callable[[Mapping[str, Any]], Row]:
    """Raw row -> Row in the form that is asked for; see `check_form`. A column `teacher` is kept."""
    marked = task.parse_row_with_marks if calculator_marks else None
    read = marked or task.parse_row

    def parse(raw: Mapping[str, Any]) -> Row:
        row, teacher = read(raw), raw.get("teacher")
        return row if teacher is None else replace(row, teacher=str(teacher))

    return parse


def prepend_shots(
    task: Task, rows: Iterable[Row], *, shots: int = 0, calculator_marks: bool = False
) -> Iterator[Row]:
    """The rows, their prompts behind the task's first `shots` worked examples (Q and A in turn)."""
    parse = build_row_parser(task, calculator_marks)
    examples = [parse(raw) for raw in task.exemplars[:shots]]
    shown = "".join(f"Q: {example.prompt}\nA: {example.target}\n\n" for example in examples)
    for row in rows:
        yield replace(row, prompt=f"{shown}Q: {row.prompt}\nA:") if shots else row
