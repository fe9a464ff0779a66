"""Every benchmark runs in its smoke form: mypy and the other tests do not read them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("step_timing.py", "calibration_cases.py", "calibration_simulation.py", "gpu_results.py")
SMOKED_BY_GPU_SH = ("grid.py", "step.py", "placement.py", "vllm_step.py")
NOT_SMOKED = (*MODULES, *SMOKED_BY_GPU_SH, "trl_tests.py", "trl_examples.py", "calibration_old.py")
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name not in NOT_SMOKED)
TRL_TEST = """
from transformers import AutoModelForCausalLM
from trl.experimental.gkd import GKDConfig, GKDTrainer


def test_the_trainer_takes_the_names_of_the_hub(tmp_path):
    name = "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5"
    assert GKDConfig(str(tmp_path)).output_dir == str(tmp_path)
    assert GKDTrainer.generalized_jsd_loss is not None
    AutoModelForCausalLM.from_pretrained(name)
"""


def run_benchmark(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_prints_figures_in_its_smoke_form(script: str) -> None:
    output = run_benchmark(str(BENCHMARKS / script), "--smoke")
    assert any(character.isdigit() for character in output)


@pytest.mark.slow
def test_the_picture_of_the_cost_of_packs_shows_the_stored_figures(tmp_path: Path) -> None:
    stored, drawn = BENCHMARKS.parent / "docs" / "img" / "pack_cost.png", tmp_path / "drawn.png"
    run_benchmark(
        str(BENCHMARKS / "grid.py"), "--curve", str(drawn),
        "--redraw", str(BENCHMARKS / "results" / "grid-cpu.json"),
    )  # fmt: skip
    pixels, stored_pixels = (matplotlib.image.imread(path) for path in (drawn, stored))
    assert pixels.shape == stored_pixels.shape
    assert float(abs(pixels - stored_pixels).mean()) < 0.002  # of 1; another mark's place moves it by more


def run_gpu_script(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    command = [str(BENCHMARKS / "gpu.sh"), "--out", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def read_parts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text())


@pytest.mark.slow
def test_the_gpu_script_measures_every_part_but_one_that_fails_in_its_smoke_form(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *loss.py*) echo broken; exit 3 ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    finished = run_gpu_script(tmp_path / "out", "--smoke", PYTHON=str(python))
    assert finished.returncode == 1, finished.stderr
    parts = read_parts(tmp_path / "out")
    assert {name: entry["status"] for name, entry in parts.items()} == {
        "loss": "failed (3)",
        **dict.fromkeys(("grid", "curve", "step", "placement", "vllm", "grid-fp32"), "done"),
    }
    figures = {name: entry["figures"] for name, entry in parts.items() if name != "loss"}
    for name, precision in (("grid", "bf16"), ("grid-fp32", "fp32")):
        assert figures[name]["comparison"].keys() & {"bf16", "fp32"} == {precision}
        assert figures[name]["comparison"][precision]["ours_s"] > 0
    assert [point["cells"] for point in figures["curve"]["curve"]] == [1, 3]
    assert [row["lmbda"] for row in figures["step"]["steps"]] == [0, 0.5, 1]
    whole, *others = (way["losses"] for way in figures["placement"]["placement"].values())
    assert len(others) == 2
    assert all(losses == pytest.approx(whole, rel=1e-3) for losses in others)
    assert figures["vllm"]["steps"]["own sampling"]["sampling_ms"] > 0


def test_parts_of_the_gpu_script_that_have_no_time_left_are_named(tmp_path: Path) -> None:
    finished = run_gpu_script(tmp_path, "--smoke", "loss", "step", SECONDS_IN_ALL="1")
    assert finished.returncode == 1
    statuses = {name: entry["status"] for name, entry in read_parts(tmp_path).items()}
    assert statuses == {"loss": "out of time", "step": "out of time"}


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["stepp"], {}, "unknown part 'stepp'"),
        ([], {}, "torch finds no GPU"),
        (["--smoke"], {"WHEELS": "nowhere"}, "no folder nowhere"),
        (["--smoke"], {"PYTHON": "nowhere/python"}, "no interpreter nowhere/python"),
    ],
)
def test_the_gpu_script_refuses_what_it_cannot_run(
    arguments: list[str], variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    finished = run_gpu_script(tmp_path, *arguments, CUDA_VISIBLE_DEVICES="", **variables)
    assert finished.returncode == 2
    assert message in finished.stderr


@pytest.mark.slow
def test_scripts_of_trl_s_own_repository_train_with_the_import_changed() -> None:
    rows = [
        line.split()[:3]
        for line in run_benchmark(str(BENCHMARKS / "trl_examples.py"), "--smoke").splitlines()
    ]
    assert rows[2:] == [[script, "gkd_lab", "trains"] for script in ("sft.py", "distillation.py")]


@pytest.mark.slow
def test_trl_tests_run_against_both_trainers(tmp_path: Path) -> None:
    file = tmp_path / "tests/experimental/test_gkd_trainer.py"
    file.parent.mkdir(parents=True)
    file.write_text(TRL_TEST)
    output = run_benchmark(str(BENCHMARKS / "trl_tests.py"), str(tmp_path))
    assert "trl: 1 of 1 passed" in output
    assert "gkd_lab: 1 of 1 passed" in output
