"""What is learnt and how it is judged: one small file per task, one registry. No torch here."""

from gkd_lab.config.errors import build_unknown_name_error
from gkd_lab.tasks import (
    arithmetic,
    classification,
    instruction,
    scoring,
    summarization,
    tagging,
    translation,
)
from gkd_lab.tasks.data import RowList, get_source_revision, load_rows
from gkd_lab.tasks.row_format import check_row_format
from gkd_lab.tasks.task import SPLITS, MadeSource, Row, Split, Task

__all__ = [
    "SPLITS",
    "TASKS",
    "MadeSource",
    "Row",
    "RowList",
    "Split",
    "Task",
    "check_row_format",
    "get_source_revision",
    "get_task",
    "load_rows",
]

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (
        arithmetic,
        translation,
        summarization,
        instruction,
        classification,
        tagging,
        scoring,
    )
}


def get_task(name: str) -> Task:
    """The task called `name`; ValueError with the valid and the nearest name otherwise."""
    if name not in TASKS:
        raise build_unknown_name_error("task", name, TASKS)
    return TASKS[name]
