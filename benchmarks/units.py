"""Time what engines add to a run: 1,000 units planned and submitted, a unit's overhead, several workers.

    python benchmarks/units.py [--smoke] [--out FILE.json]

1. A grid of 1,000 cells that run alone: load it, plan its units and what they ask for, submit them to Slurm,
   held, and cancel them. Where no Slurm answers, `sbatch` is a stand-in that takes 20 ms.
2. The whole process of a unit: one that is done, which loads nothing; one with a tiny training, less the
   seconds that its records name.
3. `gkd-lab run` of 8 tiny packs by one worker and by four, which share the cores: seconds of each, ratio.

`--smoke`: 20 cells, and 2 packs by two workers.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from gkd_lab import experiments
from gkd_lab.config import Grid
from gkd_lab.config.packs import PackLimit
from gkd_lab.config.units import Unit, plan_units
from gkd_lab.runner.engines.driver import Driver
from gkd_lab.runner.engines.slurm import SlurmEngine
from gkd_lab.runner.engines.slurm_script import SlurmOptions
from gkd_lab.status.time_estimates import TimeEstimator
from gkd_lab.status.unit_resources import estimate_resources
from gkd_lab.store import Store
from gkd_lab.store.unit_files import UnitFiles

TARGET_SECONDS = 10.0
"""For 1,000 units, planned and submitted."""
TINY_MODEL = {"layers": 1, "width": 16, "heads": 2, "sft": {"steps": 20}}
STAND_IN = "#!/bin/sh\nsleep 0.02\necho 1\n"


def write_experiment(folder: Path, name: str, seeds: int, steps: int) -> str:
    """Write a grid of 4 cells for each of `seeds` and return its file's name."""
    document = {
        "description": "a grid of tiny cells",
        "task": "arithmetic",
        "grid": {"lmbda": [0, 1], "beta": [0, 0.5], "seed": list(range(seeds))},
        "teacher": TINY_MODEL,
        "student": {**TINY_MODEL, "init_seed": 0, "sft": {"steps": 20, "seed": 0}},
        "data": {"train": 200, "validation": 8, "test": 50},
        **{"steps": steps, "batch_size": 8, "warmup_steps": 1, "cooldown_steps": 1},
        **{"max_input_tokens": 24, "max_output_tokens": 24, "evaluations": [{"decoding": "greedy"}]},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return str(path)


def measure_submission(folder: Path, cells: int) -> dict[str, Any]:
    """Return seconds of planning and of submitting a grid of cells that run alone."""
    file = write_experiment(folder, "many", cells // 4, 100)
    is_real = (
        shutil.which("sinfo") is not None and subprocess.run(["sinfo"], capture_output=True).returncode == 0
    )
    if not is_real:
        (folder / "bin").mkdir()
        for name in ("sbatch", "squeue", "scancel"):
            (folder / "bin" / name).write_text(STAND_IN if name == "sbatch" else "#!/bin/sh\n")
            (folder / "bin" / name).chmod(0o755)
        os.environ["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    start = time.perf_counter()
    grid = experiments.load(file, outputs=folder / "outputs")
    driver = build_driver(grid, "off", folder / "outputs")
    planned = time.perf_counter()
    driver.start()
    submitted = time.perf_counter()
    jobs = {job.job.partition("_")[0] for job in driver.alive.values()}
    subprocess.run(["scancel", *jobs], check=True)
    return {
        "units": len(driver.units),
        "calls_of_sbatch": len(jobs) if is_real else None,
        "slurm": "real" if is_real else "stand-in",
        "plan_s": round(planned - start, 3),
        "submit_s": round(submitted - planned, 3),
    }


def build_driver(grid: Grid, limit: PackLimit, outputs: Path) -> Driver:
    """Return a driver that submits held jobs."""
    store = Store(outputs)
    files = UnitFiles.locate(outputs, grid.fingerprint)
    units = plan_units(grid.cells, limit)
    engine = SlurmEngine(
        grid=grid,
        files=files,
        options=SlurmOptions(sbatch=("--hold",)),
        command=("true",),
        resources=estimate_resources(units, files, TimeEstimator(store, grid.scale)),
        folder=Path.cwd(),
    )
    return Driver(grid, limit, store, engine, print)


def run_command(*words: str) -> float:
    """Return the seconds of a `gkd-lab` command, which must succeed."""
    start = time.perf_counter()
    process = subprocess.run([sys.executable, "-m", "gkd_lab", *words], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return time.perf_counter() - start


def measure_overhead(folder: Path) -> dict[str, float]:
    """Return seconds of the process of a done unit, and of a unit with work beside that work."""
    file = write_experiment(folder, "few", 1, 50)
    outputs = folder / "few_outputs"
    grid = experiments.load(file, outputs=outputs)
    seconds: dict[str, float] = {}
    for unit in plan_units(grid.cells, "auto"):
        words = ["unit", file, "--unit", unit.id, "--outputs", str(outputs)]
        seconds[unit.kind] = run_command(*words)
    return {
        "done_unit_s": round(run_command(*words), 2),
        "pack_s": round(seconds["pack"], 2),
        "pack_beside_training_and_decoding_s": round(seconds["pack"] - sum_work(unit, Store(outputs)), 2),
    }


def sum_work(unit: Unit, store: Store) -> float:
    """Return the seconds of training and decoding that the records of a pack name, which all cells share."""
    record, cell = store.get_record(unit.cells[0]), unit.cells[0]
    parts = [record, *map(record.get_evaluation, cell.evaluations)]
    return sum(float(part.read_status().get("seconds", 0)) for part in parts)


def measure_workers(folder: Path, packs: int, workers: int, steps: int) -> dict[str, float]:
    """Return seconds of a run of so many packs by one worker and by several, reference models included."""
    file = write_experiment(folder, "packs", packs, steps)
    seconds = {
        count: run_command(
            *("run", file, "--pack", "4", "--workers", str(count), "--outputs", str(folder / f"by{count}"))
        )
        for count in (1, workers)
    }
    return {
        "packs": packs,
        "workers": workers,
        "one_worker_s": round(seconds[1], 1),
        "workers_s": round(seconds[workers], 1),
        "ratio": round(seconds[1] / seconds[workers], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {
            "device": platform.machine(),
            "cpus": os.cpu_count(),
            "submission": measure_submission(folder, 20 if words.smoke else 1000),
            "overhead": measure_overhead(folder),
            "workers": measure_workers(folder, *((2, 2, 10) if words.smoke else (8, 4, 300))),
            "load_average_at_the_end": os.getloadavg()[0],
        }
    submission = figures["submission"]
    assert isinstance(submission, dict)
    total = submission["plan_s"] + submission["submit_s"]
    print(json.dumps(figures, indent=1))
    units = submission["units"]
    print(f"{units} units planned and submitted in {total:.1f} s (1,000 in {TARGET_SECONDS} s aimed at)")
    if words.out is not None:
        words.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
