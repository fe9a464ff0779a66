"""What is learnt and how it is judged: one small file per task, one registry. No torch here."""

from gkd_lab.spec.errors import unknown
from gkd_lab.tasks import arithmetic, summarization, translation
from gkd_lab.tasks.data import load_rows, source_revision
from gkd_lab.tasks.task import SPLITS, MadeSource, Row, Split, Task

__all__ = [
    "SPLITS",
    "TASKS",
    "MadeSource",
    "Row",
    "Split",
    "Task",
    "get_task",
    "load_rows",
    "source_revision",
]

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (arithmetic, translation, summarization)
}


def get_task(name: str) -> Task:
    """The task called `name`; ValueError with the valid and the nearest name otherwise."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
