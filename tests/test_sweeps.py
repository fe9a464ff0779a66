"""Each shipped sweep file matches its experiment, and gives the cells of its grid."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from gkd_lab import experiments
from gkd_lab.cli.options import parse_cell_fields
from gkd_lab.config import ConfigError
from gkd_lab.config.sweep import encode_axis_value, format_sweep_file

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))


def build_command(sweep: dict[str, Any], point: dict[str, Any]) -> list[str]:
    """Return the command that wandb's client builds for a point."""
    macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in point.items()}})
    macros["env"] = ["/usr/bin/env"]
    words: list[str] = []
    for word in create_sweep_command(list(sweep["command"])):
        words += macros[word[2:-1]] if word.startswith("${") else [word]
    return words


def list_points(sweep: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield all points; axes are in alphabetical order, as the client writes them for the server."""
    axes = {name: axis["values"] for name, axis in sorted(sweep["parameters"].items())}
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def get_cell_fingerprint(words: list[str], outputs: Path) -> str:
    """Return the fingerprint of the cell that a command runs."""
    assert words[:4] == ["/usr/bin/env", "gkd-lab", "cell", "--experiment"]
    grid = experiments.load_single_cell(parse_cell_fields(words[5:]), name=words[4], outputs=outputs)
    return grid.cells[0].full_fingerprint


def test_every_experiment_has_a_sweep_file() -> None:
    assert sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_file_equals_the_output_of_the_command(name: str) -> None:
    text = (ROOT / "sweeps" / f"{name}.yaml").read_text()
    hint = f"write it anew: gkd-lab sweep {name} > sweeps/{name}.yaml"
    assert text == format_sweep_file(name, experiments.outline_experiment(name)[0], None, {}), hint


@pytest.mark.parametrize("name", NAMES)
def test_the_cells_of_a_sweep_are_the_cells_of_the_grid(name: str, tmp_path: Path) -> None:
    """Compare full fingerprints, for every experiment that can be resolved offline."""
    try:
        planned = {cell.full_fingerprint for cell in experiments.load(name, outputs=tmp_path).cells}
    except ConfigError as error:
        pytest.skip(f"cannot be resolved here: {error}")
    sweep = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
    fingerprints = [
        get_cell_fingerprint(build_command(sweep, point), tmp_path) for point in list_points(sweep)
    ]
    assert set(fingerprints) == planned
    assert len(set(fingerprints)) == experiments.outline_experiment(name)[1]


def test_spellings_of_a_number_give_the_same_cell(tmp_path: Path) -> None:
    start = ["/usr/bin/env", "gkd-lab", "cell", "--experiment", "quickstart"]
    forms = (["--beta=1", "--lmbda=0"], ["--beta=1.0", "--lmbda=0.0"], ["--beta", "1", "--lmbda", "0"])
    assert len({get_cell_fingerprint([*start, *form], tmp_path) for form in forms}) == 1


AXES = {
    "student": '{layers: 1, width: 32, heads: 2, sft: {steps: 4}},"small"',
    "learning_rate": "1e-5,0.001",
    "rescale_divergence": "true,false",
    "data.test": "8,16",
    "data.train": "null,100",
}


def test_every_kind_of_value_survives_the_client(tmp_path: Path) -> None:
    """Sections, numbers without a point, booleans, dotted names, and null."""
    for axis, text in AXES.items():
        set_for_all = {"steps": "100", "lmbda": "1", "beta": "0.5", axis: text}
        planned = experiments.load("quickstart", overrides=set_for_all, outputs=tmp_path).cells
        experiment, _ = experiments.outline_experiment("quickstart", overrides=set_for_all)
        sweep = yaml.safe_load(format_sweep_file("quickstart", experiment, None, set_for_all))
        assert "--steps=100" in sweep["command"]
        assert len(sweep["parameters"][axis]["values"]) == 2
        fingerprints = [
            get_cell_fingerprint(build_command(sweep, point), tmp_path) for point in list_points(sweep)
        ]
        assert list(dict.fromkeys(fingerprints)) == [cell.full_fingerprint for cell in planned], axis


@pytest.mark.parametrize("value", ["small", "1", "null", "a,b", "yes", "a: b", "'", '"', "/a b/c", "[", "#"])
def test_text_that_yaml_would_misread_is_quoted(value: str) -> None:
    assert yaml.safe_load(f"[{encode_axis_value(value)}]") == [value]


def test_an_experiment_without_an_axis_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("description: d\ntask: arithmetic\n")
    command = [sys.executable, "-m", "gkd_lab", "sweep", str(tmp_path / "one.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--set KEY=V1,V2" in done.stderr
