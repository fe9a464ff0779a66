"""Every benchmark runs in its smoke form: mypy and the other tests do not read them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("step_timing.py", "calibration_cases.py", "calibration_simulation.py")
NOT_SMOKED = (*MODULES, "trl_tests.py", "trl_examples.py", "calibration_old.py")
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
