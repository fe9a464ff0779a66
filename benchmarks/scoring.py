"""Time rescoring the predictions of 1,000 cells with ROUGE, and the bootstrap of their intervals.

    python benchmarks/scoring.py [--smoke] [--cells N] [--out FILE.json]

A cell has 500 predictions of 20 words; cells share prompts and references, and one prediction in five
also occurs in another cell. Predictions are read from files, scored with intervals and written back by one
process. The baselines run on some of the cells: rouge_score for each pair, and a bootstrap that draws
resamples for each cell. CPU seconds do not depend on the machine's other work; wall seconds stand beside.
"""

import argparse
import os
import platform
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from rouge_score import rouge_scorer

from gkd_lab.metrics import Scorer
from gkd_lab.metrics.intervals import bootstrap_mean_intervals
from gkd_lab.metrics.scored_predictions import parse_prediction, score_predictions
from gkd_lab.store.files import read_json_lines, write_json, write_json_lines

WORDS = re.findall(r"[a-zA-Z]+", " ".join(topics.values()))
ROUGE_METRICS = ("rouge1", "rouge2", "rougeL")
WORDS_PER_TEXT = 20
SHARED_EVERY = 5
"""Every n-th prediction is drawn from a few that all cells share."""
BASELINE_CELLS = 10
"""Cells that the baselines run on."""


def draw_sentence(draw: random.Random) -> list[str]:
    """Draw a piece of Python's own documentation."""
    start = draw.randrange(len(WORDS) - WORDS_PER_TEXT)
    return WORDS[start : start + WORDS_PER_TEXT]


def replace_words(words: Sequence[str], draw: random.Random) -> str:
    """Replace about half of a sentence's words."""
    return " ".join(draw.choice(WORDS) if draw.random() < 0.5 else word for word in words)


def write_cells(folder: Path, cells: int, examples: int) -> list[Path]:
    """Write a file of predictions for each cell; return the files."""
    draw = random.Random(0)
    references = [draw_sentence(draw) for _ in range(examples)]
    common = [[replace_words(words, draw) for _ in range(3)] for words in references]
    paths = []
    for cell in range(cells):
        rows = [
            {
                "prompt": f"prompt {n}",
                "prediction": draw.choice(common[n]) if n % SHARED_EVERY == 0 else replace_words(words, draw),
                "references": [" ".join(words)],
                "tokens": WORDS_PER_TEXT + 1,
                "ended": True,
                "scores": {},
            }
            for n, words in enumerate(references)
        ]
        paths.append(folder / f"{cell}" / "predictions.jsonl")
        write_json_lines(paths[-1], rows)
    return paths


def rescore_files(paths: Sequence[Path], metrics: Sequence[str]) -> None:
    """Read, score and write every cell, as `rescore` does."""
    scorer = Scorer()
    for path in paths:
        scores, rows = score_predictions(
            metrics, [parse_prediction(row) for row in read_json_lines(path)], scorer
        )
        write_json_lines(path, rows)
        write_json(path.with_name("scores.json"), scores)


def score_pairs(paths: Sequence[Path], metrics: Sequence[str]) -> None:
    """Score each pair with rouge_score, and do nothing else."""
    stem = metrics[0].endswith("_stem")
    scorer = rouge_scorer.RougeScorer(list(ROUGE_METRICS), use_stemmer=stem)
    for path in paths:
        for row in read_json_lines(path):
            scorer.score(row["references"][0], row["prediction"])


def bootstrap_cells(values: np.ndarray, resamples: int) -> None:
    """Bootstrap each cell with resamples of its own."""
    for row in values:
        drawn = np.random.default_rng(0).integers(row.size, size=(resamples, row.size))
        np.percentile(row[drawn].mean(axis=1), [2.5, 97.5])


def compare_times(
    name: str, cells: int, run_ours: Callable[[], object], run_baseline: Callable[[], object]
) -> dict[str, float]:
    """Return the seconds of ours on all cells, and of the baseline, scaled up from `BASELINE_CELLS`."""
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    run_ours()
    wall_seconds, cpu_seconds = time.perf_counter() - wall_start, time.process_time() - cpu_start
    cpu_start = time.process_time()
    run_baseline()
    baseline_seconds = (time.process_time() - cpu_start) * cells / min(BASELINE_CELLS, cells)
    ratio = cpu_seconds / baseline_seconds
    print(
        f"{name}: {cells} cells, {cpu_seconds:.1f} s of CPU ({wall_seconds:.1f} s), "
        f"{ratio:.2f} x the baseline"
    )
    return {
        "cells": cells,
        "cpu_s": cpu_seconds,
        "clock_s": wall_seconds,
        "plain_cpu_s": baseline_seconds,
        "ratio": ratio,
    }


def measure_all(cells: int, rescored_cells: int, examples: int, resamples: int) -> dict[str, Any]:
    """Time rescoring without and with stemming, and the bootstrap of `cells`."""
    values = np.random.default_rng(0).uniform(0, 100, size=(cells, examples))
    results: dict[str, Any] = {
        "examples": examples,
        "resamples": resamples,
        "bootstrap": compare_times(
            "bootstrap",
            cells,
            lambda: bootstrap_mean_intervals(values, resamples=resamples),
            lambda: bootstrap_cells(values[:BASELINE_CELLS], resamples),
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = write_cells(Path(folder), rescored_cells, examples)
        for ending in ("", "_stem"):
            metrics = [f"{kind}{ending}" for kind in ROUGE_METRICS]
            results[f"rouge{ending}"] = compare_times(
                f"rouge{ending}",
                rescored_cells,
                partial(rescore_files, paths, metrics),
                partial(score_pairs, paths[:BASELINE_CELLS], metrics),
            )
    return results


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="20 cells of 50 predictions, 1,000 resamples")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with hardware and versions")
    parser.add_argument("--cells", type=int, default=1_000, help="number of rescored cells")
    options = parser.parse_args()
    sizes = (20, 20, 50, 1_000) if options.smoke else (1_000, options.cells, 500, 10_000)
    results = measure_all(*sizes)
    if options.out is not None:
        packages = ("gkd-lab", "rouge-score", "nltk", "numpy")
        versions = {name: version(name) for name in packages}
        threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        write_json(
            options.out, {"device": platform.machine(), "threads": threads, "versions": versions, **results}
        )
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
