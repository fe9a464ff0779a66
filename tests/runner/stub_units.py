"""Run a unit as `gkd-lab unit` does, but with a training that sleeps and writes numbers: no torch.

    python stub_units.py unit EXPERIMENT --unit ID --outputs FOLDER --pack LIMIT [--tracker none]

GKD_STUB_SECONDS: of each step of a pack. GKD_STUB_KILL: step of a pack at which the process always
kills itself. A record has a checkpoint at every 5th step, resumes from it, and logs each step once.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from gkd_lab import experiments
from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.packs import parse_pack_limit
from gkd_lab.config.units import Unit
from gkd_lab.runner import interrupts
from gkd_lab.runner.run_unit import find_unit, run_unit
from gkd_lab.runner.workers import stop_with_parent
from gkd_lab.store import Record, Store
from gkd_lab.store.files import append_json_line
from gkd_lab.store.unit_state import get_unit_records

STEPS, CHECKPOINT_EVERY = 40, 5
FAILING_FILE = Path("failing")
"""Fingerprint of a model that fails, in the working folder: not every engine passes variables on."""


def train_record(record: Record, seconds: float, last_step: int) -> None:
    """Log STEPS rows, from the last checkpoint; save and stop when a signal asks for it."""
    folders = record.steps_folder.glob("checkpoint-*")
    start = max((int(folder.name.rpartition("-")[2]) for folder in folders), default=0)
    record.rewind_history(start)
    append_json_line(record.folder / "starts.jsonl", {"step": start, "pid": os.getpid()})
    with interrupts.delay_signals():
        for step in range(start + 1, STEPS + 1):
            time.sleep(seconds)
            record.log_row({"step": step, "loss": 1 / step})
            if step == last_step:
                os.kill(os.getpid(), signal.SIGKILL)
            is_stopping = interrupts.is_stop_requested()
            if is_stopping or step % CHECKPOINT_EVERY == 0:
                (record.steps_folder / f"checkpoint-{step}").mkdir(parents=True)
            if is_stopping:
                return


def compute_score(record: Record, metric: str) -> float:
    """Return a number in [0, 1) that depends on the record's name and history alone."""
    text = json.dumps([record.folder.name, metric, record.read_history()])
    return int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 16**6


def execute(unit: Unit, store: Store) -> None:
    """Train and evaluate each record of the unit under its lock."""
    is_pack = unit.kind == "pack"
    seconds = float(os.environ.get("GKD_STUB_SECONDS", "0")) if is_pack else 0.0
    last_step = int(os.environ.get("GKD_STUB_KILL", "0")) if is_pack else 0
    for record, *cells in zip(get_unit_records(unit, store), unit.cells, strict=False):
        with record.lock():
            if record.read_status():
                continue
            spec = unit.spec or cells[0].training
            record.write_spec(spec)
            train_record(record, seconds, last_step)
            if FAILING_FILE.exists() and FAILING_FILE.read_text() == spec.fingerprint:
                record.mark_failed("RuntimeError: broken on purpose")
                continue
            if is_pack or isinstance(spec, SftModel):
                for evaluation in dict.fromkeys(e for cell in unit.cells for e in cell.evaluations):
                    scores = {
                        metric: {"value": compute_score(record, metric), "signature": "stub"}
                        for metric in evaluation.metrics
                    }
                    record.get_evaluation(evaluation).write_results(evaluation, [], scores)
            record.finish(steps=STEPS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["unit"])
    parser.add_argument("experiment")
    for option in ("--unit", "--outputs", "--pack", "--scale", "--tracker"):
        parser.add_argument(option)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--stop-with-parent", action="store_true")
    words = parser.parse_args()
    limit, outputs = parse_pack_limit(words.pack), Path(words.outputs)
    overrides = dict(text.split("=", 1) for text in words.set)
    with interrupts.handle_signals(is_job=True):
        if words.stop_with_parent:
            stop_with_parent()
        grid = experiments.load(words.experiment, scale=words.scale, overrides=overrides, outputs=outputs)
        unit, units = find_unit(grid, limit, words.unit)
        store = Store(outputs)
        sys.exit(run_unit(unit, units, grid, store, lambda part: execute(part, store)))


if __name__ == "__main__":
    main()
