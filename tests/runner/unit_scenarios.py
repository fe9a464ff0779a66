"""A grid that an engine runs: its drivers, its records and what has happened to its units."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gkd_lab.config import Cell, Grid
from gkd_lab.config.units import Unit, plan_units
from gkd_lab.store import Record, Store
from gkd_lab.store.unit_files import UnitFiles, UnitRuns
from gkd_lab.tables.table import build_wide_table, encode_table

from .stub_units import STEPS
from .tiny_experiments import tiny_grid

HERE = Path(__file__).parent
PACK = "2"


@dataclass
class Scenario:
    """A grid in a folder of its own, with the drivers that a scenario starts one after another."""

    cluster: Any
    """The cluster of a test suite: its `environment` has the variables by which drivers reach it."""
    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    pack: str = PACK
    engine: str = "slurm"

    def __post_init__(self) -> None:
        changes = {"grid": {"lmbda": [0, 1], "beta": [0.5]}, **self.changes}
        self.grid: Grid = tiny_grid(self.folder, "arithmetic", **changes)
        self.outputs = self.folder / "outputs"
        self.store = Store(self.outputs)
        self.units = plan_units(self.grid.cells, int(self.pack) if self.pack.isdecimal() else "off")
        self.files = UnitFiles.locate(self.outputs, self.grid.fingerprint)
        self.log = self.folder / "driver.log"

    def start_driver(self, **engine_options: Any) -> "subprocess.Popen[bytes]":
        """Start a driver; its output is appended to the scenario's log."""
        root = str(HERE.parents[1])
        environment = {"PYTHONPATH": root, "GKD_STUB_SECONDS": "0.2", **self.cluster.environment}
        words = [
            self.engine,
            f"{self.grid.name}.yaml",
            str(self.outputs),
            self.pack,
            json.dumps({"mem": "100M", **engine_options}),
        ]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(HERE / "engine_driver_script.py"), *words],
                cwd=self.folder,
                env={**environment, **self.variables},
                stdout=log,
                stderr=log,
            )

    def finish(self, driver: "subprocess.Popen[bytes]") -> tuple[int, str]:
        """Return the exit status of a driver and all that the drivers have said."""
        return driver.wait(timeout=400), self.log.read_text()

    def get_pack(self, number: int = 0) -> Unit:
        return [unit for unit in self.units if unit.kind == "pack"][number]

    def get_record(self, cell: Cell | None = None) -> Record:
        return self.store.get_record(cell or self.get_pack().cells[0])

    def read_runs(self, unit: Unit | None = None) -> UnitRuns:
        return self.files.read_runs((unit or self.get_pack()).id)

    def read_starts(self, cell: Cell | None = None) -> list[dict[str, int]]:
        """Return step and process of each start of a cell's training, by default the first cell's."""
        file = self.get_record(cell).folder / "starts.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for_step(self, step: int) -> int:
        """Wait until the first cell has logged a step; return the process that trains it."""
        self.wait_until(lambda: bool(self.get_record().read_history()) and self.get_step() >= step)
        return self.read_starts()[-1]["pid"]

    def get_step(self) -> int:
        return int(self.get_record().read_history()[-1]["step"])

    def wait_until(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def read_table(self) -> bytes:
        return encode_table(build_wide_table(self.grid, self.store), "csv")

    def assert_each_step_was_logged_once(self) -> None:
        for cell in self.grid.cells:
            steps = [row["step"] for row in self.get_record(cell).read_history()]
            assert steps == list(range(1, STEPS + 1))

    def assert_resumed(self) -> None:
        """The first cell was started twice at least, and the last time not from step 0."""
        assert self.read_starts()[0]["step"] == 0
        assert self.read_starts()[-1]["step"] > 0
        assert self.read_runs().requeues >= 1


def run_locally(scenario: Scenario) -> None:
    """Run all units of a scenario one after another, without a cluster."""
    for unit in scenario.units:
        words = ["unit", "tiny.yaml", "--unit", unit.id, "--outputs", "outputs", "--pack", scenario.pack]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
        command = [sys.executable, str(HERE / "stub_units.py"), *words]
        subprocess.run(command, cwd=scenario.folder, env=environment, check=True)
