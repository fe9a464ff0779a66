"""Rooms import one way, and a name means one thing in the whole package."""

import ast
import collections
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "gkd_lab").rglob("*.py"))
MIN_LINES = 40
"""Lines of a module that only one other imports."""
MAX_LINES = 420
"""Lines of a module of the rooms that only print."""
CONTRACTS = {"gkd_lab.config.json_schema", "gkd_lab.__main__"}
"""Modules that are run by name, however small."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def importers() -> dict[str, set[str]]:
    """Each module with those that import it; the package itself imports its public names lazily."""
    names = {module_name(path) for path in MODULES}
    users: dict[str, set[str]] = collections.defaultdict(set)
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for imported in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    if imported in names and imported != module_name(path):
                        users[imported].add(module_name(path))
    return users


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger from before the test, which it must not disable for those after it."""
    logger = logging.getLogger("gkd_lab.a_logger_from_before")
    yield logger
    assert not logger.disabled
    logger.disabled = False


@pytest.mark.usefixtures("logger")
def test_imports_between_rooms_run_one_way() -> None:
    """The contracts are in pyproject.toml; `lint-imports` prints what breaks them.

    It runs as a process of its own, as it sets up logging and with that disables all loggers.
    """
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports_command as lint; lint()"
    result = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_two_modules_have_one_name() -> None:
    stems = collections.Counter(path.stem for path in MODULES if path.name != "__init__.py")
    assert [stem for stem, count in stems.items() if count > 1] == []


def test_no_two_classes_have_one_name() -> None:
    classes = collections.Counter(
        node.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in classes.items() if count > 1] == []


def test_no_small_module_serves_one_other_alone() -> None:
    users = importers()
    small = {
        module_name(path)
        for path in MODULES
        if path.name != "__init__.py" and len(path.read_text().splitlines()) < MIN_LINES
    }
    assert {name for name in small if len(users[name]) == 1} - CONTRACTS == set()


def test_modules_that_print_stay_short() -> None:
    lengths = {module_name(path): len(path.read_text().splitlines()) for path in MODULES}
    rooms = ("gkd_lab.cli.", "gkd_lab.status.")
    assert {
        name for name, length in lengths.items() if length > MAX_LINES and name.startswith(rooms)
    } == set()
