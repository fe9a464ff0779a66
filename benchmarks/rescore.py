"""Time `gkd-lab rescore` on 1,000 records with 500 predictions of 20 words each, with ROUGE.

    python benchmarks/rescore.py [--small | --smoke] [-o FILE.json]

Writes such a store in a temporary folder, every prediction different, and times the whole command in a
process of its own: ROUGE-1, -2 and -L, plain and with stemming. `--small` takes 100 records, `--smoke` 25.
`cpu_s` stays comparable when other work keeps the cores busy.
"""

import argparse
import json
import os
import platform
import random
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from load import run_command

from gkd_lab import experiments
from gkd_lab.config import Evaluation, Grid
from gkd_lab.store import Record, Store

WORDS, PREDICTIONS = 20, 500
RUNS = {
    "plain": ("rouge1", "rouge2", "rougeL"),
    "stemmed": ("rouge1_stem", "rouge2_stem", "rougeL_stem"),
}
TARGET = 360.0
"""Seconds for 1,000 records on 2 cores."""


def write_experiment(folder: Path, cells: int) -> Path:
    """Write an experiment of `cells` cells, a multiple of 25: lmbda x beta x seed on summarization."""
    axes = {
        "lmbda": [0, 0.25, 0.5, 0.75, 1],
        "beta": [0, 0.1, 0.5, 0.9, 1],
        "seed": [*range(cells // 25)],
    }
    evaluations = [{"decoding": "greedy", "metrics": list(RUNS["plain"])}]
    document = {"description": "speed", "task": "summarization", "grid": axes, "evaluations": evaluations}
    path = folder / "speed.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def build_vocabulary() -> list[str]:
    """Build 3,000 words, with endings that a stemmer must handle."""
    draw = random.Random(0)
    letters = "abcdefghijklmnoprstuvw"
    stems = ["".join(draw.choices(letters, k=draw.randint(2, 7))) for _ in range(600)]
    return [stem + ending for stem in stems for ending in ("", "s", "ed", "ing", "ation")]


def write_store(grid: Grid, store: Store) -> None:
    """Write all records: cells share prompts and references, and no two predictions are equal."""
    words, draw = build_vocabulary(), random.Random(1)
    references = [draw.choices(words, k=WORDS) for _ in range(PREDICTIONS)]
    for cell in grid.cells:
        predictions = [
            [word if draw.random() < cell.lmbda / 2 + 0.2 else draw.choice(words) for word in reference]
            for reference in references
        ]
        evaluation = cell.evaluations[0]
        assert isinstance(evaluation, Evaluation)
        write_record(store.get_record(cell), evaluation, references, predictions)


def write_record(
    record: Record, evaluation: Evaluation, references: list[list[str]], predictions: list[list[str]]
) -> None:
    """Write one finished record with these predictions."""
    rows: list[dict[str, Any]] = [
        {
            "prompt": f"document {n}",
            "prediction": " ".join(text),
            "references": [" ".join(reference)],
            "tokens": WORDS,
            "ended": True,
            "scores": {},
        }
        for n, (text, reference) in enumerate(zip(predictions, references, strict=True))
    ]
    record.get_evaluation(evaluation).write_results(evaluation, rows, {}, rows=len(rows))
    record.finish(steps=1)


def main() -> None:
    """Write the store, time both runs, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="100 records")
    parser.add_argument("--smoke", action="store_true", help="25 records")
    parser.add_argument("-o", type=Path, default=None, help="a JSON file for the figures")
    options = parser.parse_args()
    cells = 25 if options.smoke else 100 if options.small else 1000
    target = TARGET * cells / 1000
    times = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_experiment(folder, cells)
        grid = experiments.load(str(path), outputs=folder / "outputs")
        write_store(grid, Store(folder / "outputs"))
        for run, metrics in RUNS.items():
            words = ["rescore", str(path), "--metrics", ",".join(metrics)]
            seconds, _ = run_command(words, folder / "outputs")
            times[run] = seconds
            share = seconds["wall_s"] / target
            print(
                f"{run}: {seconds['wall_s']} s, {seconds['cpu_s']} s of CPU; "
                f"{share:.2f} x the target {target:.0f} s",
                flush=True,
            )
    if options.o:
        versions = {package: version(package) for package in ("rouge-score", "numpy", "nltk")}
        facts = {"device": platform.machine(), "cpus": os.cpu_count(), "versions": versions}
        sizes = {"records": cells, "predictions": PREDICTIONS, "words": WORDS}
        text = json.dumps({**facts, **sizes, "runs": times, "target_s": target}, indent=1)
        options.o.write_text(text + "\n")


if __name__ == "__main__":
    main()
