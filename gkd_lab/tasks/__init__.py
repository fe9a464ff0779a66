"""Tasks: their rows, metrics and default settings, one small file each, and their registry. No torch."""

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
from gkd_lab.tasks.task import SPLITS, Row, RowGenerator, Split, Task

__all__ = [
    "SPLITS",
    "TASKS",
    "Row",
    "RowGenerator",
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
    """Return the task called `name`; ConfigError with the nearest names if there is none."""
    if name not in TASKS:
        raise build_unknown_name_error("task", name, TASKS)
    return TASKS[name]
