"""Completion, as the shells ask for it: bash through its script, zsh through the environment."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from gkd_lab import experiments
from gkd_lab.cli.command_table import COMMANDS
from gkd_lab.cli.completion import join_bash_words

from .command_runs import BLOCKED, python, write_experiment

QUICKSTART = ("plan", "quickstart", "--set")
BLOCK = f"import sys\nfor name in {BLOCKED!r}: sys.modules[name] = None\n"


@pytest.fixture(autouse=True)
def gkd_lab_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a `gkd-lab` without the heavy packages first on the path; torch cannot be imported in it."""
    command = tmp_path / "bin" / "gkd-lab"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\n{BLOCK}from gkd_lab.cli import main\nmain()\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")


def complete_in_bash(*words: str) -> list[str]:
    """Return COMPREPLY of a real bash for COMP_WORDS as readline splits them."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    quoted = " ".join(f"'{word}'" for word in ("gkd-lab", *words))
    script = f"""
eval "$(_GKD_LAB_COMPLETE=source_bash gkd-lab)"
COMP_WORDS=({quoted}); COMP_CWORD={len(words)}
_gkd_lab_completion gkd-lab
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    result = subprocess.run([bash, "--norc", "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.split()


def unescape(text: str) -> str:
    """Undo typer's escapes for zsh."""
    return text.replace(r"\\:", ":").replace("''", "'")


def complete_in_zsh(line: str) -> dict[str, str]:
    """Return value -> help that zsh would show for a line up to the cursor."""
    environment = {"_GKD_LAB_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": line}
    result = python(f"{BLOCK}from gkd_lab.cli import main; main([])", **environment)
    assert (result.returncode, result.stderr) == (0, "")
    pairs = re.findall(r'"([^"]*)"(?::"([^"]*)")?', result.stdout)
    return {unescape(value): unescape(text) for value, text in pairs}


IN_BASH: list[tuple[Sequence[str], list[str]]] = [
    (("pl",), ["plan"]),
    (("plan", "quick"), ["quickstart"]),
    (("plan", "--se"), ["--set"]),
    (("plan", "quickstart", "--scale", ""), ["nano", "smol", "paper"]),
    (("plan", "quickstart", "--scale", "=", "n"), ["nano"]),
    ((*QUICKSTART, "lmb"), ["lmbda=", "lmbda=0", "lmbda=0.5", "lmbda=1"]),
    ((*QUICKSTART, "lmbda", "="), ["0", "0.5", "1"]),
    ((*QUICKSTART, "lmbda", "=", "0"), ["0", "0.5"]),
    ((*QUICKSTART, "lmbda", "=", "0,"), ["0,0.5", "0,1"]),
    (
        (*QUICKSTART, "lmbda", "=", "0,1", "--set", "imp"),
        ["implementation=", "implementation=gkd_lab", "implementation=trl"],
    ),
    (("plan", "quickstart", "--set=student", "=", "b"), ["base"]),
    (("plan", "quickstart", "--scale", "smol", "--set", "steps", "="), ["1000"]),
    ((*QUICKSTART, "data.so"), ["data.source=", "data.source=made"]),
    (("rescore", "quickstart", "--metrics", "accuracy,b"), ["accuracy,bleu"]),
    (("claims", "pap"), ["paper"]),
    (("compare", "0a"), []),
]


@pytest.mark.parametrize(("words", "expected"), IN_BASH)
def test_bash_completes_commands_options_experiments_keys_and_values(
    words: Sequence[str], expected: list[str]
) -> None:
    assert complete_in_bash(*words) == expected


IN_ZSH: dict[str, list[str]] = {
    "gkd-lab pl": ["plan"],
    "gkd-lab plan quick": ["quickstart"],
    "gkd-lab plan quickstart --set lmbda=": ["lmbda=0", "lmbda=0.5", "lmbda=1"],
    "gkd-lab plan quickstart --set=lmbda=0,": ["lmbda=0,0.5", "lmbda=0,1"],
    "gkd-lab plan quickstart --set steps=": ["steps=400"],
    "gkd-lab plan --set student=": [],
    "gkd-lab plan nonesuch --set precision=b": ["precision=bf16"],
    "gkd-lab status quickstart --set task=te": ["task=text"],
}


@pytest.mark.parametrize(("line", "expected"), IN_ZSH.items())
def test_zsh_completes_whole_words(line: str, expected: list[str]) -> None:
    assert list(complete_in_zsh(line)) == expected


def test_zsh_shows_each_command_with_its_whole_line_of_help() -> None:
    assert complete_in_zsh("gkd-lab ") == {name: entry.short_help for name, entry in COMMANDS.items()}


def test_experiments_are_also_files_here_and_below_a_folder() -> None:
    write_experiment("description: d\ntask: arithmetic\ngrid: {lmbda: [0.25, 0.75]}\n", "qmine.yaml")
    Path("deep").mkdir()
    write_experiment("description: d\n", "deep/other.yml")
    assert complete_in_bash("plan", "q") == ["quality_diversity", "quickstart", "qmine.yaml"]
    assert complete_in_bash("plan", "deep/") == ["deep/other.yml"]
    assert complete_in_bash("plan", "qmine.yaml", "--set", "lmbda", "=") == ["0.25", "0.75"]


def test_a_broken_experiment_leaves_the_choices_of_the_field() -> None:
    write_experiment("task: [", "broken.yaml")
    assert complete_in_bash("plan", "broken.yaml", "--set", "precision", "=") == ["fp32", "bf16", "fp64"]


def test_cells_are_completed_by_the_fingerprints_below_the_outputs_folder() -> None:
    for folder, outputs in (("lmbda=0_beta=1_seed=0-0a1b2c3d", "outputs"), ("start-2x48-0aff0000", "other")):
        (Path(outputs) / "nano" / "arithmetic" / folder).mkdir(parents=True)
        (Path(outputs) / "nano" / "arithmetic" / folder / "spec.json").write_text("{}")
    assert complete_in_bash("compare", "0a") == ["0a1b2c3d"]
    assert complete_in_bash("export", "--outputs", "other", "0") == ["0aff0000"]
    assert complete_in_zsh("gkd-lab push ") == {"0a1b2c3d": "nano/arithmetic/lmbda=0_beta=1_seed=0-0a1b2c3d"}


def test_show_completes_the_cells_of_its_experiment() -> None:
    name = write_experiment("description: d\ntask: arithmetic\ngrid: {lmbda: [0, 1]}\n")
    fingerprints = [cell.fingerprint for cell in experiments.load(name).cells]
    assert sorted(complete_in_bash("show", "--experiment", name, "")) == sorted(fingerprints)
    assert complete_in_bash("show", "--experiment", name, fingerprints[0][:3]) == [fingerprints[0]]
    assert complete_in_bash("new", "--task", "arith") == ["arithmetic"]


def test_completion_of_cells_does_not_ask_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process with all packages: the hub's client does not load where torch is blocked."""
    data = "scale: smol\ndata: {source: owner/rows}"
    name = write_experiment(f"description: d\ntask: arithmetic\n{data}\ngrid: {{lmbda: [0, 1]}}\n")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("_GKD_LAB_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"gkd-lab show --experiment {name} ")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        subprocess.run([sys.executable, "-m", "gkd_lab"], check=True, capture_output=True)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    ("words", "joined", "typed"),
    [
        (["g", "plan", "--set", "beta", "="], ["g", "plan", "--set", ""], "beta="),
        (["g", "plan", "--set", "beta", "=", "0,"], ["g", "plan", "--set", "0,"], "beta="),
        (["g", "--set", "a", "=", "1", "--set", "b"], ["g", "--set", "a=1", "--set", "b"], ""),
        (["g", "--set", "teacher", "=", "pypi", ":", "x"], ["g", "--set", "x"], "teacher=pypi:"),
        (["g", "--scale", "=", "na"], ["g", "--scale", "na"], ""),
        (["g", "--set", "=", "beta", "=", "0"], ["g", "--set", "0"], "beta="),
    ],
)
def test_words_that_bash_splits_at_separators_are_joined(
    words: list[str], joined: list[str], typed: str
) -> None:
    environment = {
        "_GKD_LAB_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    join_bash_words(environment)
    assert environment["COMP_WORDS"].split("\n") == joined
    assert environment["COMP_CWORD"] == str(len(joined) - 1)
    assert environment["_GKD_LAB_TYPED"] == typed


def test_other_calls_and_shells_keep_their_environment() -> None:
    for environment in ({}, {"_GKD_LAB_COMPLETE": "complete_zsh", "COMP_WORDS": "a\n=", "COMP_CWORD": "1"}):
        before = dict(environment)
        join_bash_words(environment)
        assert environment == before
