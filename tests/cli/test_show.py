"""`gkd-lab show`: the values of a cell, run or not, and where each comes from."""

import json
from pathlib import Path
from typing import Any

import pytest

from gkd_lab import experiments
from gkd_lab.config import Cell
from gkd_lab.store import Record, Store

from .command_runs import BLOCK, BLOCKED, RunCommand, python, write_experiment

MINE = "description: d\ntask: arithmetic\nsteps: 311\ngrid:\n  lmbda: [0, 1]\n  seed: [3, 4]\n"
OUTPUTS = Path("outputs")


def write_record(cell: Cell, *words: str) -> Record:
    """Write the files with which a record begins, as of a run by `words`."""
    record = Store(OUTPUTS).get_record(cell)
    record.write_spec(cell.training, scale=cell.scale, labels=cell.labels)
    record.write_provenance({"command": ["gkd-lab", *words]})
    return record


def load_cell(number: int = 0, **overrides: str) -> Cell:
    write_experiment(MINE)
    return experiments.load("mine.yaml", overrides=overrides, outputs=OUTPUTS).cells[number]


def read_shown(out: str) -> dict[str, Any]:
    shown = json.loads(out)
    shown["from"] = {value["field"]: value["from"] for value in shown["values"]}
    shown["value"] = {value["field"]: value["value"] for value in shown["values"]}
    return shown


def test_a_cell_that_was_not_run_is_shown_by_its_experiment(run_command: RunCommand) -> None:
    cell = load_cell(3)
    words = ("show", cell.fingerprint[:6], "--experiment", "mine.yaml")
    status, out, err = run_command(*words, "--format", "json")
    assert (status, err) == (0, "")
    shown = read_shown(out)
    assert shown["fingerprint"] == cell.full_fingerprint
    assert (shown["role"], shown["status"]) == ("cell", "missing")
    assert shown["value"]["source.lmbda"] == 1
    assert shown["from"]["source.lmbda"] == ["axis lmbda, mine.yaml:5"]
    assert shown["from"]["steps"] == ["mine.yaml:3"]
    assert shown["from"]["scale"] == ["built-in default"]
    status, text, _ = run_command(*words)
    assert "axis lmbda, mine.yaml:5" in text
    rows = [line.split()[:2] for line in text.splitlines()]
    assert ["optimizer.learning_rate", "0.003"] in rows
    assert ["sft.steps", "2000"] in rows  # of the student, in its group


def test_a_record_elsewhere_is_shown_with_its_own_folder_and_status(run_command: RunCommand) -> None:
    record = write_record(load_cell(), "run", "mine.yaml")
    record.mark_done()
    moved = record.folder.rename(Path(record.folder.name))
    shown = read_shown(run_command("show", str(moved), "--format", "json")[1])
    assert (shown["folder"], shown["status"]) == (str(moved), "done")
    assert shown["from"]["steps"] == ["mine.yaml:3"]


def test_options_of_the_experiment_are_sources_too(run_command: RunCommand) -> None:
    cell = load_cell(1, steps="313")
    words = ("show", cell.fingerprint, "--experiment", "mine.yaml", "--set", "steps=313")
    shown = read_shown(run_command(*words, "--scale", "nano", "--format", "json")[1])
    assert shown["from"]["steps"] == ["--set steps"]
    assert shown["from"]["scale"] == ["--scale"]


def test_a_record_is_explained_by_the_command_that_wrote_it(run_command: RunCommand) -> None:
    cell = load_cell(2, steps="313")
    record = write_record(cell, "run", "mine.yaml", "--set", "steps=313", "--workers", "2")
    for name in (cell.fingerprint, str(record.folder)):
        status, out, _ = run_command("show", name, "--format", "json")
        shown = read_shown(out)
        assert (status, shown["note"]) == (0, None)
        assert shown["folder"] == str(record.folder)
        assert shown["experiment"] == "mine.yaml --set steps=313 (mine.yaml)"
        assert shown["from"]["steps"] == ["--set steps"]


def test_a_sweep_agents_record_is_explained_by_its_fields(run_command: RunCommand) -> None:
    cell = load_cell(2)
    write_record(cell, "cell", "--experiment", "mine.yaml", "--lmbda=1", "--seed", "3")
    shown = read_shown(run_command("show", cell.fingerprint, "--format", "json")[1])
    assert shown["from"]["source.lmbda"] == ["axis lmbda, --set lmbda"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("run", "mine.yaml"), "which does not give it now (mine has no cell"),
        (("run", "gone.yaml"), "which does not give it now (no experiment file 'gone.yaml'"),
        (("cell", "--task", "arithmetic", "--lmbda", "1"), "does not say by which experiment"),
        (("train", "--config", "run.yaml"), "does not say by which experiment"),
        ((), "does not say by which experiment"),
    ],
)
def test_without_its_experiment_a_record_shows_values_and_how_to_ask_for_sources(
    words: tuple[str, ...], reason: str, run_command: RunCommand
) -> None:
    cell = load_cell(2, steps="313")
    write_record(cell, *words)
    status, out, _ = run_command("show", cell.fingerprint, "--format", "json")
    shown = read_shown(out)
    assert status == 0
    assert reason in shown["note"]
    assert shown["note"].endswith(f"gkd-lab show {cell.fingerprint} --experiment EXP")
    assert shown["value"]["steps"] == 313
    assert not any(shown["from"].values())
    by_experiment = ("show", cell.fingerprint, "--experiment", "mine.yaml", "--set", "steps=313")
    with_sources = read_shown(run_command(*by_experiment, "--format", "json")[1])
    same = {field: value for field, value in with_sources["value"].items() if field in shown["value"]}
    assert {**shown["value"], **same} == shown["value"]  # both show the same values
    assert shown["value"].keys() <= with_sources["value"].keys()


def test_a_teacher_and_a_start_show_their_own_values(run_command: RunCommand) -> None:
    cell = load_cell()
    for role, model in cell.training.reference_models:
        words = ("show", model.fingerprint, "--experiment", "mine.yaml", "--format", "json")
        shown = read_shown(run_command(*words)[1])
        assert shown["role"] == role
        assert {value["group"] for value in shown["values"]} == {
            "cell",
            "data",
            "teacher" if role == "teacher" else "student",
        }
        record = Store(OUTPUTS).get_artifact("nano", role, model)
        record.write_spec(model, role=role)
        record.write_provenance({"command": ["gkd-lab", "run", "mine.yaml"]})
        assert read_shown(run_command(*words[:2], "--format", "json")[1])["values"] == shown["values"]


WRONG = {
    "show 1a2b": "no record '1a2b': 'outputs' has no records yet; a cell that was not run is shown with",
    "show 1a2b --experiment mine.yaml": "mine has no cell '1a2b' at nano; valid:",
    "show 1a2b --experiment quikstart": "unknown experiment 'quikstart'; did you mean 'quickstart'?",
    "show 1a2b --set steps=3": "--scale and --set belong to an experiment: add --experiment EXP",
    "show 1a2b --format yaml": "'yaml' is not one of 'text', 'json'",
    "show . ": "'.' is not a record: it has no spec.json",
    "show": "Missing argument 'CELL'",
    "show 1a --experiment mine.yaml --set teacher=owner/name": "the hub is offline; add it to outputs",
    "show 1a2b --outputs mine.yaml": "--outputs 'mine.yaml' is a file",
}


@pytest.mark.parametrize(("words", "message"), WRONG.items())
def test_a_wrong_request_gives_one_message_and_status_2(
    words: str, message: str, run_command: RunCommand
) -> None:
    write_experiment(MINE)
    status, out, err = run_command(*words.split())
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_several_cells_of_one_prefix_are_listed(run_command: RunCommand) -> None:
    load_cell()
    status, _, err = run_command("show", "", "--experiment", "mine.yaml")
    assert status == 2
    assert "cells ''" in err


def test_show_loads_no_torch() -> None:
    cell = load_cell()
    result = python(BLOCK, ",".join(BLOCKED), "show", cell.fingerprint, "--experiment", "mine.yaml")
    assert (result.returncode, result.stderr) == (0, "")
