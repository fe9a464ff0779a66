"""Each value of a resolved cell is said to come from the place that stated it, and stands there."""

import re
from pathlib import Path
from typing import Any

import pytest

from gkd_lab import experiments
from gkd_lab.config import Grid
from gkd_lab.config.explain_cell import ResolvedValue
from gkd_lab.tasks import TASKS
from gkd_lab.tasks.scale_defaults import COMMON_SETTINGS

EVERYWHERE = """\
description: d
task: arithmetic
steps: 311
learning_rate: 0.0037
source: {lmbda: 0.37, temperature: 0.83, text: {samples: 13}}
max_input_tokens: 29
student: {size: base, init_seed: 17, sft: {rows: 211, learning_rate: 0.0041}}
teacher: {size: large, dtype: bfloat16}
data: {seed: 19, train: 1913}
precision: fp64
evaluations:
  - {decoding: greedy, examples: 43}
  - decoding: sample
    temperature: 0.59
    max_output_tokens: 23
objectives:
  - beta: 0.41
    teacher_temperature: 1.7
  - {type: cross_entropy, weight: 0.61}
per_scale:
  nano:
    weight_decay: 0.031
    eval_every: 53
    eval_rows: 59
per_task:
  arithmetic:
    warmup_steps: 61
    batch_size: 37
    metrics: [accuracy_numeric, accuracy]
grid:
  seed: [67, 71]
  student_temperature: [1.9]
  dropout: [0.047]
"""
SHORTHAND = """\
description: d
grid:
  task: [arithmetic, summarization]
  method: [imitkd, f_distill, seqkd]
  student.sft.rows: [101, 103]
beta: null
student: small
max_grad_norm: 0.93
"""


def load(text: str, tmp_path: Path, **overrides: str) -> Grid:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    outputs = tmp_path / "outputs"
    return experiments.load(str(path), overrides=overrides, outputs=outputs, allow_missing_revisions=True)


def explain(grid: Grid, number: int = 0) -> dict[str, ResolvedValue]:
    values = experiments.explain_grid_cell(grid, grid.cells[number])
    return {f"{value.group}: {value.field}": value for value in values}


def find_line(source: str) -> int | None:
    match = re.search(r"mine\.yaml:(\d+)", source)
    return int(match[1]) if match else None


def is_in_line(value: Any, line: str) -> bool:
    """Whether a line of a file has a value, or all parts of a list."""
    if isinstance(value, list):
        return all(is_in_line(part, line) for part in value)
    text = str(value)
    return re.search(rf"(?<![\w.]){re.escape(text)}(?![\w.])", line) is not None


def test_a_value_with_a_line_of_the_file_stands_in_that_line(tmp_path: Path) -> None:
    grid = load(EVERYWHERE, tmp_path)
    lines = EVERYWHERE.splitlines()
    for number, seed in enumerate((67, 71)):
        values = explain(grid, number)
        assert values["cell: seed"].value == seed
        for name, value in values.items():
            for source in value.sources:
                line = find_line(source)
                # Where several sources are given, the last one is the reason and not the value.
                if line is not None and len(value.sources) == 1 and not name.endswith(": checkpoint"):
                    shown = "29" if "max_input" in name else value.value
                    assert is_in_line(shown, lines[line - 1]), (name, value)


def test_every_value_of_the_file_is_the_source_of_a_resolved_one(tmp_path: Path) -> None:
    grid = load(EVERYWHERE, tmp_path)
    sources = [source for value in explain(grid).values() for source in value.sources]
    named = {line for source in sources if (line := find_line(source))}
    lines = enumerate(EVERYWHERE.splitlines(), start=1)
    stated = {number for number, line in lines if re.search(r"\d|: \w|\[", line)}
    assert stated - named == {1}  # the description


EXPECTED = {
    "cell: seed": (67, "axis seed, mine.yaml:31"),
    "loss: objectives.0.beta": (0.41, "mine.yaml:17"),
    "loss: objectives.0.teacher_temperature": (1.7, "mine.yaml:18"),
    "loss: objectives.0.student_temperature": (1.9, "axis student_temperature, mine.yaml:32"),
    "loss: objectives.1.weight": (0.61, "mine.yaml:19"),
    "loss: objectives.1.type": ("cross_entropy", "mine.yaml:19"),
    "loss: objectives.0.weight": (1.0, "built-in default"),
    "loss: loss_normalization": ("sequence", "default of all tasks at nano"),
    "text: source.lmbda": (0.37, "mine.yaml:5"),
    "text: source.text.samples": (13, "mine.yaml:5"),
    "text: source.text.decoding": ("sample", "built-in default"),
    "training: steps": (311, "mine.yaml:3"),
    "training: batch_size": (37, "mine.yaml:28 (per_task.arithmetic)"),
    "training: train_rows": (211, "mine.yaml:7"),
    "training: selection.every": (53, "mine.yaml:23 (per_scale.nano)"),
    "training: selection.metric": ("accuracy_numeric", "mine.yaml:29 (per_task.arithmetic)"),
    "training: optimizer.name": ("adamw", "default of all tasks at nano"),
    "training: optimizer.learning_rate": (0.0037, "mine.yaml:4"),
    "training: optimizer.warmup_steps": (61, "mine.yaml:27 (per_task.arithmetic)"),
    "training: optimizer.cooldown_steps": (77, "as 100 of the default 400 steps"),
    "training: optimizer.weight_decay": (0.031, "mine.yaml:22 (per_scale.nano)"),
    "lengths: max_output_tokens": (24, "default of arithmetic at nano"),
    "data: data.train": (1913, "mine.yaml:9"),
    "data: data.test": (1000, "default of arithmetic at nano"),
    "data: data.kind": ("made", "default of arithmetic at nano"),
    "teacher: teacher.model.name": ("large", "mine.yaml:8"),
    "teacher: teacher_dtypes": (["bfloat16"], "mine.yaml:8"),
    "teacher: teacher.model.architecture.width": (96, "default of arithmetic at nano"),
    "teacher: teacher.model.architecture.feed_forward": (384, "4 times the width"),
    "teacher: teacher.sft.steps": (1000, "default of arithmetic at nano"),
    "teacher: teacher.dropout": (0.0, "default of all tasks at nano"),
    "student: start.model.init_seed": (17, "mine.yaml:7"),
    "student: start.sft.optimizer.learning_rate": (0.0041, "mine.yaml:7"),
    "student: start.sft.optimizer.weight_decay": (0.0, "default of all tasks at nano"),
    "student: start.sft.seed": (
        67,
        "default of arithmetic at nano; seed of the cell; axis seed, mine.yaml:31",
    ),
    "student: start.max_input_tokens": (29, "mine.yaml:6"),
    "evaluation greedy: examples": (43, "mine.yaml:12"),
    "evaluation greedy: max_output_tokens": (24, "default of arithmetic at nano"),
    "evaluation sample0.59: temperature": (0.59, "mine.yaml:14"),
    "evaluation sample0.59: max_output_tokens": (23, "mine.yaml:15"),
    "evaluation sample0.59: metrics": (
        ["accuracy_numeric", "accuracy"],
        "mine.yaml:29 (per_task.arithmetic)",
    ),
    "evaluation sample0.59: examples": (1000, "default of arithmetic at nano"),
}


@pytest.mark.parametrize(("name", "expected"), EXPECTED.items())
def test_values_have_the_source_that_was_written_down_beforehand(
    name: str, expected: tuple[Any, str], tmp_path: Path
) -> None:
    value = explain(load(EVERYWHERE, tmp_path))[name]
    assert (value.value, "; ".join(value.sources)) == expected


def test_what_set_states_names_the_option_and_no_line(tmp_path: Path) -> None:
    overrides = {"steps": "313", "data.train": "1917", "seed": "73,79", "teacher.size": "base"}
    values = explain(load(EVERYWHERE, tmp_path, **overrides), 1)
    assert values["training: steps"].sources == ("--set steps",)
    assert values["data: data.train"].sources == ("--set data.train",)
    assert values["data: data.seed"].sources == ("mine.yaml:9",)
    assert values["cell: seed"].value == 79
    assert values["cell: seed"].sources == ("axis seed, --set seed",)
    assert values["teacher: teacher.model.name"].value == "base"
    assert values["teacher: teacher.model.name"].sources == ("--set teacher.size",)


def test_a_method_is_the_source_of_what_it_fixes(tmp_path: Path) -> None:
    grid = load(SHORTHAND, tmp_path)
    for number, cell in enumerate(grid.cells):
        values, labels = explain(grid, number), cell.labels
        method = f"method {labels['method']}, mine.yaml:4"
        assert values["text: source.lmbda"].sources == (method,)
        assert values["cell: task"].sources == ("axis task, mine.yaml:3",)
        assert values["training: train_rows"].value == labels["student.sft.rows"]
        assert values["training: train_rows"].sources == ("axis student.sft.rows, mine.yaml:5",)
        assert values["student: start.model.name"].sources == ("mine.yaml:7",)
        if labels["method"] == "seqkd":
            assert values["loss: objectives.0.type"].sources == (method,)
            assert values["text: source.text.decoding"].sources == (method,)
        else:
            assert values["loss: objectives.0.divergence"].sources == (method,)


def test_a_default_says_whether_it_is_of_the_task_of_its_real_data_or_of_the_student(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text('{"document": "It rained.", "summary": "Rain."}\n' * 9)
    text = f"description: d\ntask: summarization\ndata: {{source: {folder}}}\n"
    values = explain(load(text, tmp_path))
    assert values["lengths: max_input_tokens"].sources == (
        "default of summarization at nano, for data that is not made",
    )
    assert values["training: steps"].sources == ("default of summarization at nano",)
    assert values["data: data.path"].sources == ("mine.yaml:3",)


@pytest.mark.parametrize("name", experiments.list_experiment_files())
def test_every_value_of_the_experiments_has_a_source(name: str, tmp_path: Path) -> None:
    grid = experiments.load(name, outputs=tmp_path, allow_missing_revisions=True)
    path = experiments.find_experiment_file(name)
    lines = path.read_text().splitlines()
    for cell in (grid.cells[0], grid.cells[len(grid.cells) // 2], grid.cells[-1]):
        for value in experiments.explain_grid_cell(grid, cell):
            assert value.sources, value
            for source in value.sources:
                match = re.search(rf"{re.escape(path.name)}:(\d+)", source)
                assert "with the values set" not in source
                assert match or path.name not in source, value  # a file without a line
                if match and len(value.sources) == 1 and isinstance(value.value, int | float | str):
                    line = lines[int(match[1]) - 1]
                    assert line.strip(), value


@pytest.mark.parametrize("name", ["lambda_beta_translation", "lambda_beta_summarization", "student_size"])
def test_at_paper_scale_too_every_value_has_a_source(name: str, tmp_path: Path) -> None:
    grid = experiments.load(name, scale="paper", outputs=tmp_path, allow_missing_revisions=True)
    for cell in grid.cells[:: max(1, len(grid.cells) // 5)]:
        assert all(value.sources for value in experiments.explain_grid_cell(grid, cell))


def test_a_default_stands_in_the_layer_that_it_is_said_to_come_from(tmp_path: Path) -> None:
    for scale in ("nano", "smol", "paper"):
        for task in ("arithmetic", "summarization", "translation", "instruction"):
            text = f"description: d\ntask: {task}\nscale: {scale}\n"
            text += "teacher: owner/a\nstudent: owner/b\n" if scale == "smol" else ""
            for value in explain(load(text, tmp_path)).values():
                name = value.field.removeprefix("optimizer.")
                if name not in COMMON_SETTINGS[scale] and name not in TASKS[task].scales[scale]:
                    continue
                if value.sources == (f"default of all tasks at {scale}",):
                    assert value.value == COMMON_SETTINGS[scale][name]
                    assert name not in TASKS[task].scales[scale]
                elif value.sources == (f"default of {task} at {scale}",):
                    assert value.value == TASKS[task].scales[scale][name]


def test_a_student_and_reverse_kl_have_defaults_of_their_own(tmp_path: Path) -> None:
    text = "description: d\ntask: summarization\nscale: paper\ngrid: {student: [small], beta: [0, 1]}\n"
    forward, reverse = (explain(load(text, tmp_path), number) for number in (0, 1))
    defaults = TASKS["summarization"].scales["paper"]["per_student"]["small"]
    name = "training: optimizer.learning_rate"
    assert forward[name].value == defaults["learning_rate"]
    assert forward[name].sources == ("default of summarization at paper, for the student small",)
    assert reverse[name].value == defaults["reverse_kl"]["learning_rate"]
    assert reverse[name].sources == (
        "default of summarization at paper, for the student small and reverse KL",
    )
