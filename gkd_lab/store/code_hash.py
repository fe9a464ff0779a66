"""Hash of the code that results depend on, without comments and docstrings.

A committed table carries it, so that it can be said whether today's code might give other numbers.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_ROOMS = ("tasks", "metrics", "encoding", "models", "losses", "teachers", "training", "evaluation")
_RUNNER_MODULES = (
    *("artifacts", "build_trainer", "cross_tokenizer", "dataset", "evaluate_cells", "greedy_scores"),
    *("selection", "sft", "teacher_scores", "teacher_text", "train_cells", "training_inputs"),
)
"""Modules of the runner that decide about results; the others schedule, lock, report and track."""
_DEFAULTS = "SCALES"
"""Constant of a task that is left out: cells hold its values in their fingerprints."""
_SHOWN_DIGITS = 16


@cache
def compute_code_hash() -> str:
    """Return the first 16 hexadecimal digits of a SHA-256 over the code that results depend on; cached."""
    root = Path(__file__).parents[1]
    total = hashlib.sha256()
    for path in _iterate_files(root):
        name = path.relative_to(root).as_posix()
        total.update(f"{name}\0{_dump_code(path.read_text())}\0".encode())
    return total.hexdigest()[:_SHOWN_DIGITS]


def _iterate_files(root: Path) -> Iterator[Path]:
    """Yield the modules of the rooms, then those of the runner, in a fixed order."""
    for room in _ROOMS:
        yield from sorted((root / room).rglob("*.py"))
    yield from (root / "runner" / f"{name}.py" for name in _RUNNER_MODULES)


def _dump_code(source: str) -> str:
    """Return the syntax tree of a module as text, without docstrings, positions and default settings."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not _is_default_settings(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[ast.get_docstring(node, clean=False) is not None :]
    return ast.dump(tree)


def _is_default_settings(node: ast.stmt) -> bool:
    """Return whether a statement of a module sets the default settings of a task."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id == _DEFAULTS for target in targets)
