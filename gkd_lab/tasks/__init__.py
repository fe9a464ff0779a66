"""Tasks: their rows, metrics and default settings, one small file each, and their registry. No torch."""

from gkd_lab.config.errors import build_unknown_name_error
from gkd_lab.tasks import (
    arithmetic,
    classification,
    instruction,
    scoring,
    summarization,
    tagging,
    text,
    translation,
)
from gkd_lab.tasks.columns import resolve_columns
from gkd_lab.tasks.data import (
    RowList,
    check_first_rows,
    count_few_train_rows,
    get_source_revision,
    is_data_folder,
    list_missing_splits,
    load_rows,
)
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
    "check_first_rows",
    "check_row_format",
    "count_few_train_rows",
    "get_source_revision",
    "get_task",
    "is_data_folder",
    "list_missing_splits",
    "load_rows",
    "resolve_columns",
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
        text,
    )
}


def get_task(name: str) -> Task:
    """Return the task called `name`; ConfigError with the nearest names if there is none."""
    if name not in TASKS:
        raise build_unknown_name_error("task", name, TASKS)
    return TASKS[name]
