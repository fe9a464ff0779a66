"""Format of prompts and targets: few-shot examples before the question, calculator marks kept or removed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from gkd_lab.config.artifact_specs import ColumnNames
from gkd_lab.tasks.columns import TEACHER_COLUMN, build_column_reader, describe_columns
from gkd_lab.tasks.task import Row, Task


def check_row_format(task: Task, kind: str, *, shots: int = 0, calculator_marks: bool = False) -> None:
    """Raise ValueError if a task lacks so many worked examples, or the calculator marks asked for."""
    count = len(task.exemplars)
    if shots not in range(count + 1):
        choices = f"{count}: choose 0 to {count}" if count else "none: leave `shots` out"
        raise ValueError(f"data.shots: {shots} is not valid: worked examples of {task.name} are {choices}")
    if calculator_marks and (kind == "made" or task.parse_row_with_marks is None):
        raise ValueError(
            f"data.calculator_marks: {kind} rows of {task.name} have no marks such as <<48/2=24>>; rows of a "
            "folder or hub data set in GSM8K's form have them (task arithmetic)"
        )


def build_row_parser(
    task: Task, calculator_marks: bool, columns: ColumnNames | None = None
) -> Callable[[Mapping[str, Any]], Row]:
    """Return the function raw row -> Row, calculator marks kept or not; a column `teacher` is kept.

    columns: Names of the raw row's columns that are not the task's.
    """
    parse_task_row = (task.parse_row_with_marks if calculator_marks else None) or task.parse_row
    rename_columns = build_column_reader(task, columns)

    def parse_row(raw: Mapping[str, Any]) -> Row:
        """Return a raw row as a Row, with the name in its column `teacher` if it has one."""
        renamed = rename_columns(raw)
        try:
            row, teacher = parse_task_row(renamed), renamed.get(TEACHER_COLUMN)
        except ValueError as error:
            raise ValueError(f"{error}{describe_columns(task, columns)}") from error
        return row if teacher is None else replace(row, teacher=str(teacher))

    return parse_row


def prepend_shots(
    task: Task, rows: Iterable[Row], *, shots: int = 0, calculator_marks: bool = False
) -> Iterator[Row]:
    """Yield the rows with `shots` worked examples (Q and A in turn) before the prompt; unchanged for 0."""
    parse_row = build_row_parser(task, calculator_marks)
    examples = [parse_row(raw) for raw in task.exemplars[:shots]]
    prefix = "".join(f"Q: {example.prompt}\nA: {example.target}\n\n" for example in examples)
    for row in rows:
        yield replace(row, prompt=f"{prefix}Q: {row.prompt}\nA:") if shots else row
