"""Measure whether another seed and another number of threads repeat an SFT student's score.

    python benchmarks/starts.py [--smoke] [--task NAME] [--rows N ...] [--rate LR ...] [--steps N]
                                [--seeds N ...] [--threads N ...] [--problems N] [--json FILE]

Every seed has its own weights and its own order of the rows. A start can be quoted if its standard deviation
over seeds, and its mean difference between one thread and several, are at most 3 points. Each number of
threads runs `gkd-lab run` in a process and a folder of its own; the distillation that follows has one step.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

LIMIT = 3.0
"""Points by which a start may move: as a standard deviation over seeds, and between numbers of threads."""
TRAIN_ROWS = 200
"""Training rows on which it is shown that a start has converged."""

Key = tuple[int, float, int]
"""Rows, learning rate, threads."""
Scores = dict[str, list[float]]
"""Split -> score of each seed, in the order of the seeds."""


def build_experiment(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return an experiment whose SFT students cross rows and rates, distilled for a step."""
    students = [
        {
            "size": "small",
            "init_seed": "cell",
            "sft": {"rows": rows, "steps": arguments.steps, "learning_rate": rate, "seed": "cell"},
        }
        for rows in arguments.rows
        for rate in arguments.rate
    ]
    return {
        "description": "Starts of several seeds",
        "task": arguments.task,
        "teacher": {"size": "small", "sft": {"steps": 1}},
        **{"steps": 1, "warmup_steps": 0, "cooldown_steps": 0, "lmbda": 0, "beta": 0},
        "data": {"test": arguments.problems},
        "evaluations": [
            {"decoding": "greedy"},
            {"decoding": "greedy", "split": "train", "examples": min(TRAIN_ROWS, *arguments.rows)},
        ],
        "grid": {"student": students, "seed": arguments.seeds},
    }


def run_starts(experiment: dict[str, Any], threads: int) -> dict[Key, Scores]:
    """Train and score the starts in a process with so many threads, and return their scores."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "starts.yaml")
        file.write_text(yaml.safe_dump(experiment))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "gkd_lab", "run", str(file), "--outputs", f"{folder}/outputs"]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        scores: dict[Key, Scores] = defaultdict(lambda: defaultdict(list))
        for sft, split, score in sorted(
            read_scores(Path(folder, "outputs")), key=lambda item: item[0]["seed"]
        ):
            key = sft["rows"], sft["optimizer"]["learning_rate"], threads
            scores[key][split].append(score)
        return scores


def read_scores(outputs: Path) -> Iterator[tuple[dict[str, Any], str, float]]:
    """Yield (settings of the SFT, split, score by the task's first metric) of each start."""
    for start in outputs.glob("nano/*/start-*"):
        sft = json.loads((start / "spec.json").read_text())["spec"]["sft"]
        for file in start.glob("evaluations/*/scores.json"):
            split = json.loads((file.parent / "spec.json").read_text())["spec"]["split"]
            yield sft, split, next(iter(json.loads(file.read_text()).values()))["value"]


def build_table(results: dict[Key, Scores], least_threads: int) -> Table:
    """Return a row for each setting: scores, their mean and deviation, and the difference by threads."""
    table = Table("rows", "rate", "threads", "test, each seed", "mean", "SD", "by threads", "train", box=None)
    for (rows, rate, threads), scores in results.items():
        test = scores["test"]
        deviation = statistics.stdev(test) if len(test) > 1 else float("nan")
        difference = statistics.mean(test) - statistics.mean(results[rows, rate, least_threads]["test"])
        mark = " !" if deviation > LIMIT else ""
        table.add_row(
            *(f"{rows:,}", f"{rate:g}", str(threads), " ".join(f"{score:.1f}" for score in test)),
            *(f"{statistics.mean(test):.1f}", f"{deviation:.1f}{mark}"),
            f"{difference:+.1f}{' !' if abs(difference) > LIMIT else ''}" if threads != least_threads else "",
            f"{min(scores['train']):.1f}",
        )
    return table


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; `--smoke` replaces the sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two seeds of 4 steps")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--rows", type=int, nargs="+", default=[250])
    parser.add_argument("--rate", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--problems", type=int, default=2000, help="rows of the test split")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.smoke:
        sizes = {"rows": [40], "steps": 4, "seeds": [0, 1], "threads": [1], "problems": 20}
        vars(arguments).update(sizes)
    return arguments


def main() -> None:
    """Run the starts with each number of threads, print the table and write the scores."""
    arguments = parse_arguments()
    experiment = build_experiment(arguments)
    results: dict[Key, Scores] = {}
    for threads in arguments.threads:
        results.update(run_starts(experiment, threads))
    Console(width=140).print(build_table(dict(sorted(results.items())), min(arguments.threads)))
    if arguments.json:
        names = ("rows", "learning_rate", "threads")
        settings = {name: getattr(arguments, name) for name in ("task", "steps", "seeds", "problems")}
        starts = [{**dict(zip(names, key, strict=True)), **scores} for key, scores in results.items()]
        machine = {"torch": version("torch"), "machine": platform.machine(), "cores": os.cpu_count()}
        arguments.json.write_text(json.dumps({**machine, **settings, "starts": starts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
