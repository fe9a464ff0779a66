"""Batch scripts and job arrays of the Slurm engine, without Slurm."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.cli import main
from gkd_lab.config import ConfigError, Grid
from gkd_lab.config.units import plan_units
from gkd_lab.runner.engines.driver import Driver
from gkd_lab.runner.engines.slurm import SlurmEngine, run_slurm_command
from gkd_lab.runner.engines.slurm_script import SlurmOptions, parse_sbatch_words, parse_time_limit
from gkd_lab.status.time_estimates import TimeEstimator
from gkd_lab.status.unit_resources import UnitResources, estimate_resources
from gkd_lab.store import Store
from gkd_lab.store.unit_files import UnitFiles

from .tiny_experiments import tiny_grid

SMALL, LARGE = UnitResources(2**30, 1800, False), UnitResources(2**32, None, False)


def render_scripts(grid: Grid, tmp_path: Path, pack: int = 2, **options: Any) -> list[str]:
    units = plan_units(grid.cells, pack)
    engine = SlurmEngine(
        grid=grid,
        files=UnitFiles.locate(tmp_path, grid.fingerprint),
        options=SlurmOptions(**options),
        command=("python", "-m", "gkd_lab", "unit", "tiny.yaml"),
        resources={unit.id: SMALL if unit.kind == "pack" else LARGE for unit in units},
        folder=tmp_path,
    )
    return engine.render_scripts(units, {unit.id: (*unit.needs, *unit.partial_needs) for unit in units})


def list_directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_a_failed_teacher_ends_only_the_packs_that_need_it(tmp_path: Path) -> None:
    teachers = [{"layers": 1, "width": width, "heads": 2, "sft": {"steps": 4}} for width in (16, 24)]
    grid = tiny_grid(tmp_path, "arithmetic", grid={"teacher": teachers, "beta": [0, 0.5, 1]})
    artifacts, first, second = map(list_directives, render_scripts(grid, tmp_path))
    assert artifacts["array"] == "0-2" and "dependency" not in artifacts
    assert (first["array"], second["array"]) == ("0-1", "0-1")
    assert first["dependency"] == "afterok:JOB1_0:JOB1_1"
    assert second["dependency"] == "afterok:JOB1_2:JOB1_1"
    assert first["kill-on-invalid-dep"] == "yes"


def test_a_student_of_some_cells_only_has_to_end(tmp_path: Path) -> None:
    student = {"layers": 1, "width": 8, "heads": 2, "sft": {"steps": 4}, "init_seed": "cell"}
    grid = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0], "seed": [0, 1]}, student=student)
    _, pack = map(list_directives, render_scripts(grid, tmp_path))
    assert pack["dependency"] == "afterok:JOB1_0,afterany:JOB1_1:JOB1_2"


def test_resources_come_from_the_plan_and_options_replace_them(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    artifacts, packs = map(list_directives, render_scripts(grid, tmp_path))
    assert (artifacts["mem"], artifacts.get("time")) == ("4096M", None)
    assert (packs["mem"], packs["time"], packs["signal"]) == ("1024M", "30", "B:USR1@120")
    given = {"mem": "9G", "time": "1", "gpus": 2, "partition": "p", "account": "a", "sbatch": ("--mem=1G",)}
    for script in render_scripts(grid, tmp_path, **given):
        directives = list_directives(script)
        assert (directives["time"], directives["signal"]) == ("1", "B:USR1@15")
        assert (directives["gres"], directives["partition"], directives["account"]) == ("gpu:2", "p", "a")
        assert script.index("--mem=9G") < script.index("--mem=1G"), "the last one wins"


@pytest.mark.parametrize("max_jobs", [1, 2, 5])
def test_max_jobs_holds_over_all_arrays(max_jobs: int, tmp_path: Path) -> None:
    axes = {"task": ["arithmetic", "translation"], "beta": [0, 0.5, 1]}
    grid = tiny_grid(tmp_path, "arithmetic", grid=axes)
    scripts = [list_directives(script) for script in render_scripts(grid, tmp_path, max_jobs=max_jobs)]
    artifacts, *packs = scripts
    limits = [int(script["array"].partition("%")[2]) for script in scripts]
    assert (limits[0], artifacts.get("dependency")) == (max_jobs, None)
    assert "afterany:JOB1" in packs[0]["dependency"].split(",")
    if max_jobs == 1:
        assert "afterany:JOB2" in packs[1]["dependency"].split(",")
    else:
        assert sum(limits[1:]) == max_jobs
        assert "afterany:JOB1" in packs[1]["dependency"].split(",")


def test_scripts_are_valid_bash(tmp_path: Path) -> None:
    folder = tmp_path / "a folder's name"
    grid = tiny_grid(folder, "arithmetic")
    for script in render_scripts(grid, folder):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert all(unit.id in "".join(render_scripts(grid, folder)) for unit in plan_units(grid.cells, 2))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1", 60), ("90", 5400), ("1:30", 90), ("1:30:00", 5400), ("2-0", 172800), ("1-2:03:04", 93784)],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize(
    "options", [{"time": "soon"}, {"mem": "much"}, {"gpus": -1}, {"max_jobs": 0}], ids=lambda o: str(o)
)
def test_values_that_slurm_would_not_read_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        SlurmOptions(**options).check()


def test_sbatch_options_are_split_and_checked() -> None:
    assert parse_sbatch_words("--qos=long '--comment=two words'") == ("--qos=long", "--comment=two words")
    with pytest.raises(ConfigError, match="'long'"):
        parse_sbatch_words("--qos long")


def test_a_thousand_units_are_submitted_in_seconds_beside_a_full_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for Slurm's commands: a queue of 5,000 other jobs, and a `sbatch` that answers."""
    programs = {
        "sbatch": "echo 7",
        "squeue": 'for n in $(seq 5000); do echo "9_$n|RUNNING|None|n1|other-$n"; done',
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    start = time.monotonic()
    grid = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0, 0.5], "seed": list(range(500))})
    units, store = plan_units(grid.cells, "off"), Store(tmp_path / "outputs")
    files = UnitFiles.locate(store.root, grid.fingerprint)
    resources = estimate_resources(units, files, TimeEstimator(store, grid.scale))
    command = ("python", "-m", "gkd_lab", "unit", "tiny.yaml")
    engine = SlurmEngine(grid, files, SlurmOptions(), command, resources, tmp_path)
    driver = Driver(grid, "off", store, engine, say=lambda _: None)
    driver.start()
    assert time.monotonic() - start < 10
    assert len(driver.alive) == len(units) >= 1000
    assert files.read_jobs().keys() == {unit.id for unit in units}


def run_command(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(words)
    return int(stop.value.code or 0)


def test_print_shows_the_scripts_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_grid(tmp_path, "arithmetic")
    monkeypatch.chdir(tmp_path)
    assert run_command("run", "tiny.yaml", "--executor", "slurm", "--print", "--pack", "3") == 0
    output = capsys.readouterr().out
    assert output.count("#!/bin/bash") == 2
    assert output.count("arithmetic: pack of 3 cells") == 2
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--executor", "slurm"), "there is no `sbatch` on the PATH"),
        (("--executor", "slum"), "did you mean 'slurm'"),
        (("--executor", "slurm", "--workers", "2"), "--max-jobs limits its jobs"),
        (("--gpus", "1"), "add --executor slurm"),
        (("--executor", "slurm", "--time", "never"), "--time 'never': expected minutes"),
    ],
)
def test_requests_that_cannot_be_run_are_refused(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_grid(tmp_path, "arithmetic")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_command("run", "tiny.yaml", *words) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_commands_of_slurm_without_a_cluster_are_refused(tmp_path: Path) -> None:
    """As on a machine where Slurm is installed and nothing configures it."""
    text = "sinfo: error: _establish_config_source: failed to fetch config; no configuration source"
    command = tmp_path / "sinfo"
    command.write_text(f"#!/bin/sh\necho '{text}' >&2\nexit 1\n")
    command.chmod(0o755)
    with pytest.raises(ConfigError, match="finds no configuration of a cluster on this machine"):
        run_slurm_command(str(command))
