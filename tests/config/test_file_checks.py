"""What an experiment file or `--set` leaves ambiguous is refused, in files with the line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import ConfigError, read_experiment
from gkd_lab.config.yaml_files import read_yaml_mapping

from .stub import get_refusal, make_cell, make_grid

DOUBTFUL = ["no", "off", "yes", "true", "010", "1:30", "1_000", "0x10"]


@pytest.mark.parametrize("text", DOUBTFUL)
@pytest.mark.parametrize("field", ["seed", "lmbda", "steps", "temperature", "data.train", "student.sft.rows"])
def test_a_word_or_a_padded_number_is_no_number_on_the_command_line(field: str, text: str) -> None:
    message = get_refusal({field: text})
    assert f"{field}: {'true' if text == 'true' else repr(text)} is not valid: must be a" in message
    assert f"grid.{field}[1]: " in get_refusal({field: f"1,{text}"})


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"seed": True}, "seed: true is not valid: must be a whole number"),
        ({"seed": -1}, "seed: -1 is not valid: must be at least 0"),
        ({"grid": {"seed": [0, -1]}}, "grid.seed[1]: -1"),
        ({"grid": {"seed": [0, "010"]}}, "grid.seed[1]: '010'"),
        ({"seed": "010"}, "did you mean 10?"),
        ({"lmbda": "00.5"}, "did you mean 0.5?"),
        ({"student": {"sft": {"seed": -1}}}, "student.sft.seed: -1 is not valid: must be at least 0"),
        ({"student": {"init_seed": True}}, "student.init_seed: true"),
        ({"data": {"seed": -1}}, "data.seed: -1"),
        ({"evaluations": [{"decoding": "sample", "seed": -1}]}, "evaluations[0].seed: -1"),
        ({"evaluations": [{"decoding": "greedy", "examples": True}]}, "evaluations[0].examples: true"),
        ({"objectives": [{"beta": True}]}, "objectives[0].beta: true"),
        ({"objectives": [{"beta": 0, "weight": "01"}]}, "objectives[0].weight: '01'"),
        ({"student": {"keep_layers": [0, True]}}, "student.keep_layers[1]: true"),
        ({"teachers": {"other": {"layers": True}}}, "teachers.other.layers: true"),
        ({"per_task": {"sums": {"steps": True}}}, "per_task.sums.steps: true"),
        ({"train_rows": True}, "train_rows: true"),
    ],
)
def test_a_doubtful_number_is_refused_at_every_depth(document: dict[str, Any], expected: str) -> None:
    assert expected in get_refusal(**document)


def test_spellings_of_a_number_are_one_cell() -> None:
    for spellings in (["0", "-0.0", "0.0", "0e5", "'0'"], ["1e-3", ".001", "0.001", "1E-03", "+0.0010"]):
        cells = {
            (cell.full_fingerprint, cell.folder)
            for text in spellings
            for cell in [make_cell({"lmbda": text})]
        }
        assert len(cells) == 1
        assert len(make_grid({"lmbda": ",".join(spellings)}).cells) == 1


def test_words_stay_words_where_text_or_a_boolean_belongs() -> None:
    assert make_cell({"rescale_divergence": "true"}, beta=0.5).training.objectives[0].rescale is True
    assert make_cell(train_rows="all").training == make_cell().training
    assert "student: True" in get_refusal(student=True)


@pytest.mark.parametrize(
    "document",
    [
        {"steps": 5, "grid": {"steps": [9]}},
        {"per_task": {"sums": {"steps": 5}}, "grid": {"steps": [9]}},
        {"per_scale": {"paper": {"steps": 5}}, "grid": {"steps": [9]}},
        {"data": {"train": 5}, "grid": {"data.train": [9]}},
        {"student": {"sft": {"rows": 5}}, "grid": {"student.sft.rows": [9]}},
        {"student": "small", "grid": {"student": ["large"]}},
    ],
)
def test_a_fixed_value_beside_its_axis_is_refused(document: dict[str, Any]) -> None:
    (axis,) = document["grid"]
    message = get_refusal(**document)
    assert axis in message
    assert f"beside the axis grid.{axis}; leave one out" in message


def test_a_part_of_a_section_beside_an_axis_of_another_part_is_fine() -> None:
    cells = make_grid(data={"train": 50}, grid={"data.seed": [0, 1]}).cells
    assert [(cell.training.data.train, cell.training.data.seed) for cell in cells] == [(50, 0), (50, 1)]
    assert len(make_grid(steps=None, grid={"steps": [3, 4]}).cells) == 2


def test_an_axis_of_the_command_line_replaces_fixed_values() -> None:
    document = {"steps": 5, "per_task": {"sums": {"steps": 7}}, "data": {"train": 50}}
    cells = make_grid({"steps": "3,4", "data.train": "10,20"}, **document).cells
    assert [(cell.training.steps, cell.training.data.train) for cell in cells] == [
        (3, 10),
        (3, 20),
        (4, 10),
        (4, 20),
    ]


def write_file(folder: Path, *lines: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text("\n".join(["description: d", "task: sums", *lines]) + "\n")
    return path


@pytest.mark.parametrize(
    ("lines", "place"),
    [
        (["lmbda: 1", "seed: 010"], "mine.yaml:4: seed: '010'"),
        (["seed: -1"], "mine.yaml:3: seed: -1"),
        (["seed: true"], "mine.yaml:3: seed: true"),
        (["lmbda: no"], "mine.yaml:3: lmbda: 'no'"),
        (["grid:", "  seed:", "  - 0", "  - 1:30"], "mine.yaml:6: grid.seed[1]: '1:30'"),
        (["student:", "  sft:", "    stps: 3"], "mine.yaml:5: unknown field 'student.sft.stps'"),
        (["lmbda: 1", "grid: {lmbda: [0, 1]}"], "mine.yaml:3: lmbda: the fixed value 1"),
        (["grid:", "  lmbda: 1"], "mine.yaml:4: grid.lmbda: must be a list"),
        (
            ["per_task:", "  words: {steps: 3}"],
            "mine.yaml:4: per_task.words: the experiment has no such task",
        ),
        (
            ["evaluations:", "- decoding: greedy", "- {decoding: beem}"],
            "mine.yaml:5: evaluations[1].decoding",
        ),
    ],
)
def test_a_refusal_names_the_line_of_the_file(lines: list[str], place: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_experiment(write_file(tmp_path, *lines))
    assert place in str(caught.value)


def test_a_task_of_the_command_line_may_leave_sections_of_other_tasks_unused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("description: d\ngrid: {task: [sums, words]}\nper_task: {words: {steps: 3}}\n")
    experiment = read_experiment(path, {"task": "sums"})
    assert experiment.list_axes() == {"task": ("sums",)}


def test_what_the_command_line_set_has_no_line(tmp_path: Path) -> None:
    path = write_file(tmp_path, "seed: 1")
    with pytest.raises(ConfigError, match=r"mine\.yaml, with the values set: seed: '010'"):
        read_experiment(path, {"seed": "010"})


def test_only_what_the_command_line_set_is_without_a_line(tmp_path: Path) -> None:
    """`seed` is also a field of `data` and of a model's `sft`; `per_task` stands in the file."""
    path = write_file(
        tmp_path,
        "data: {seed: -1}",
        "student: {sft: {seed: 0, steps: 1}}",
        "grid: {student.sft.seed: [0, 1]}",
        "per_task: {sums: {seed: 2}}",
    )
    _, origin = read_yaml_mapping(path, "")
    origin = replace(origin, set_fields=("seed", "student.sft.steps", "lmbda"))
    lines = {location: line for location, line in origin.lines.items() if location}
    student = ("student", "ModelSettings", "sft")
    places = {
        ("data", "seed"): lines["data", "seed"],
        (*student, "seed"): lines["student", "sft", "seed"],
        ("grid", "student.sft.seed", 1): lines["grid", "student.sft.seed"],
        ("per_task", "sums", "seed"): lines["per_task", "sums", "seed"],
        ("student", "ModelSettings", "steps"): lines[("student",)],
    }
    for location, line in places.items():
        assert origin.format_place(location) == f"{path}:{line}"
    for location in (("seed",), (*student, "steps"), ("grid", "lmbda", 0), ("lmbda", "constrained-float")):
        assert origin.format_place(location) == f"{path}, with the values set"
    with pytest.raises(ConfigError, match=rf"mine\.yaml:{lines['data', 'seed']}: data\.seed: -1"):
        read_experiment(path, {"seed": "3"})
