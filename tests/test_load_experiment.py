"""`gkd_lab.load`: names, files, values of fields and axes, and what is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gkd_lab
from gkd_lab import experiments
from gkd_lab.config import ConfigError
from gkd_lab.store import Store

from .tables.synthetic_store import fill_store

TEXT = "{description: made up, task: arithmetic, steps: 4, grid: {lmbda: [0, 1], beta: [0, 0.5, 1]}}"


@pytest.fixture(autouse=True)
def experiment_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(TEXT)
    return Path("small.yaml")


def list_points(experiment: gkd_lab.Experiment) -> list[tuple[float, float | None]]:
    return [(cell.lmbda, cell.beta) for cell in experiment.cells]


def test_a_name_and_a_path_are_loaded_with_the_cells_of_plan() -> None:
    named = gkd_lab.load("quickstart")
    assert (named.name, named.scale, len(named.cells)) == ("quickstart", "nano", 15)
    planned = experiments.load("small.yaml").cells
    for source in ("small.yaml", Path("small.yaml"), Path("small.yaml").resolve()):
        assert [cell.fingerprint for cell in gkd_lab.load(source).cells] == [
            cell.fingerprint for cell in planned
        ]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"steps": 8}, "steps=8"),
        ({"beta": [0, 1]}, "beta=0,1"),
        ({"beta": np.array([0.5])}, "beta=0.5"),
        ({"lmbda": np.float64(0.25)}, "lmbda=0.25"),
        ({"seed": range(2)}, "seed=0,1"),
        ({"seed": np.int64(3)}, "seed=3"),
        ({"student": ["small", {"size": "base"}]}, "student=small,{size: base}"),
        ({"rescale_divergence": True}, "rescale_divergence=true"),
        ({"data.train": 500}, "data.train=500"),
        ({"learning_rate": 1e-05}, "learning_rate=1e-5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_give_the_cells_of_the_same_text_after_set(overrides: dict[str, Any], text: str) -> None:
    key, _, value = text.partition("=")
    loaded = gkd_lab.load("small.yaml", **overrides)
    expected = experiments.load("small.yaml", overrides={key: value})
    assert [cell.full_fingerprint for cell in loaded.cells] == [
        cell.full_fingerprint for cell in expected.cells
    ]
    assert loaded.grid.axes == expected.axes


def test_a_list_of_lists_crosses_values_that_are_lists() -> None:
    Path("small.yaml").write_text("{description: made up, task: arithmetic, grid: {lmbda: [0, 1]}}")
    objectives: list[Any] = [[{"beta": 0}], [{"beta": 1}, {"type": "cross_entropy", "weight": 0.5}]]
    crossed = gkd_lab.load("small.yaml", objectives=objectives)
    assert list_points(crossed) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    single = gkd_lab.load("small.yaml", objectives=objectives[1])
    assert list_points(single) == [(0, 1), (1, 1)]


def test_text_is_one_value_and_not_a_list() -> None:
    with pytest.raises(ConfigError, match="'0,1' is not valid: must be a number"):
        gkd_lab.load("small.yaml", beta="0,1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name_or_path": "quickstat"}, "unknown experiment 'quickstat'; did you mean 'quickstart'?"),
        ({"scale": "nanoo"}, "unknown scale 'nanoo'; did you mean 'nano'?"),
        ({"outputs": "small.yaml"}, "'small.yaml' is a file"),
        ({"lmda": [0, 1]}, "unknown field 'lmda'; did you mean 'lmbda'?"),
        ({"stepz": 3}, "unknown field 'stepz'; did you mean 'steps'?"),
        ({"beta": 2}, "2 is not valid: must be from 0 to 1"),
        ({"beta": float("nan")}, "grid.beta[0]: 'NaN' is not valid: must be a finite number"),
        ({"beta": []}, "grid.beta[0]: [] is not valid: must be a number"),
        ({"beta": {0, 1}}, "beta: {0, 1} is not valid: expected text, a number"),
        ({"steps": 1 + 2j}, "steps: (1+2j) is not valid: expected text, a number"),
    ],
)
def test_a_wrong_request_has_the_message_of_the_command_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gkd_lab.load(**{"name_or_path": "small.yaml", **arguments})
    assert message in str(caught.value)


def test_an_experiment_knows_where_its_records_are() -> None:
    experiment = gkd_lab.load("small.yaml", outputs="elsewhere", beta=[0, 1])
    assert repr(experiment) == "<experiment small: 4 cells at nano scale, records in 'elsewhere'>"
    fill_store(experiment.grid, Store(Path("elsewhere")))
    table = gkd_lab.table(experiment)
    cells = table[(table["role"] == "cell") & (table["metric"] == "accuracy")]
    assert dict(zip(zip(cells["lmbda"], cells["beta"], strict=True), cells["value"], strict=True)) == {
        (0, 0): 40, (0, 1): 36, (1, 0): 70, (1, 1): 66,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="the experiment has its own outputs; leave `outputs` out"):
        gkd_lab.table(experiment, outputs="other")
    assert gkd_lab.heat_map(table, "accuracy").axes
    assert list(gkd_lab.judge(table, ["C1"])["id"]) == ["C1"]


def test_loading_needs_no_torch() -> None:
    code = (
        "import sys, gkd_lab\n"
        "experiment = gkd_lab.load('small.yaml')\n"
        "assert len(experiment.cells) == 6\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
