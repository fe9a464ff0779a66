"""The help: commands in groups, whole at 80 columns, with examples that can be typed; it loads nothing."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gkd_lab.cli.command_table import COMMAND_GROUPS, COMMANDS, load_command

from .command_runs import BLOCKED, RunCommand, python

EXAMPLES = [(name, example) for name, entry in COMMANDS.items() for example in entry.examples]
READS_A_RECORD = {"compare", "show", "evaluate", "export", "push"}
CHEAP = {"list", "plan", "status", "sweep", "table", "claims"}
"""Commands whose examples run in an empty folder within a second or two."""


def test_the_list_of_commands_has_each_command_whole_in_its_group(
    run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run_command("--help")
    assert status == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    for title, group in COMMAND_GROUPS.items():
        start = lines.index(f"{title}:") + 1
        section = lines[start : start + len(group)]
        assert [line.split(maxsplit=1) for line in section] == [
            [name, entry.short_help] for name, entry in group.items()
        ]


def test_the_list_of_commands_imports_neither_pydantic_nor_a_room_of_the_package() -> None:
    code = """
import sys
from gkd_lab.cli import main
try:
    main(["--help"])
finally:
    rooms = {name.split(".")[1] for name in sys.modules if name.startswith("gkd_lab.")}
    assert rooms == {"cli"}, rooms
    assert not {"pydantic", "yaml", "rich"} & sys.modules.keys()
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_ends_with_examples_of_it(
    name: str, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run_command(name, "--help")
    assert status == 0
    assert COMMANDS[name].examples
    for example in COMMANDS[name].examples:
        assert example.startswith(f"gkd-lab {name}")
        assert example in out  # on one line


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_every_example_is_a_valid_call(name: str, example: str) -> None:
    words = shlex.split(example.partition(" > ")[0])[2:]
    context = load_command(name).make_context(name, words)  # raises UsageError for what it does not take
    assert bool(context.args) == ("context_settings" in COMMANDS[name].options), "words left for a command"


@pytest.mark.parametrize(("name", "example"), [item for item in EXAMPLES if item[0] in CHEAP])
def test_a_cheap_example_runs_in_an_empty_folder(name: str, example: str, run_command: RunCommand) -> None:
    words = shlex.split(example.partition(" > ")[0].replace(" --watch", ""))[1:]
    status, _, err = run_command(*words)
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    "example",
    [example for name, example in EXAMPLES if name in READS_A_RECORD and "--experiment" not in example],
)
def test_an_example_with_a_cell_asks_for_that_record(example: str, run_command: RunCommand) -> None:
    status, out, err = run_command(*shlex.split(example)[1:])
    assert (status, out) == (2, "")
    assert "no record '1a2b3c4d'" in err


def test_the_help_of_a_command_that_plans_loads_no_torch() -> None:
    code = f"import sys\nfor name in {BLOCKED!r}: sys.modules[name] = None\n"
    for name in ("plan", "table", "cell", "run", "train", "export"):
        command = [sys.executable, "-c", f"{code}from gkd_lab.cli import main; main([{name!r}, '--help'])"]
        assert subprocess.run(command, capture_output=True, cwd=Path.cwd()).returncode == 0, name
