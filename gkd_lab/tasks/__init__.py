"""What is learnt and how it is judged: one small file per task, one registry. No torch here."""

from gkd_lab.config.errors import unknown
from gkd_lab.tasks import (
    arithmetic,
    classification,
    instruction,
    scoring,
    summarization,
    tagging,
    translation,
)
from gkd_lab.tasks.data import Rows, load_rows, source_revision
from gkd_lab.tasks.row_format import check_form
from gkd_lab.tasks.task import SPLITS, MadeSource, Row, Split, Task

__all__ = [
    "SPLITS",
    "TASKS",
    "MadeSource",
    "Row",
    "Rows",
    "Split",
    "Task",
    "check_form",
    "get_task",
    "load_rows",
    "source_revision",
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
        raise unknown("task", name, TASKS)
    return TASKS[name]
