"""Rescoring the stored predictions of 1,000 cells with ROUGE, and the bootstrap of their intervals.

    python benchmarks/scoring.py [--small] [--cells N] [--out FILE.json]

A cell has 500 predictions of 20 words; cells share prompts and references, and one prediction in five is one
that another cell has too. They are read from files, judged with intervals and written back, in one process.
Beside it, on some of the cells: rouge_score called for each pair, and a bootstrap that gathers each cell's
own resamples. Seconds are the processor's, so that a busy machine does not change them, and the clock's.
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
"""One prediction in so many is drawn from a few that all cells have in common."""
BASELINE_CELLS = 10
"""Cells that the plain ways are timed on."""


def draw_sentence(draw: random.Random) -> list[str]:
    """Running text of Python's own documentation."""
    start = draw.randrange(len(WORDS) - WORDS_PER_TEXT)
    return WORDS[start : start + WORDS_PER_TEXT]


def replace_words(words: Sequence[str], draw: random.Random) -> str:
    """The sentence with about half of its words replaced."""
    return " ".join(draw.choice(WORDS) if draw.random() < 0.5 else word for word in words)


def write_cells(folder: Path, cells: int, examples: int) -> list[Path]:
    """A file of stored predictions for each cell."""
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
    """What a change of the metrics asks for: read, judge and write every cell."""
    scorer = Scorer()
    for path in paths:
        scores, rows = score_predictions(
            metrics, [parse_prediction(row) for row in read_json_lines(path)], scorer
        )
        write_json_lines(path, rows)
        write_json(path.with_name("scores.json"), scores)


def score_pairs(paths: Sequence[Path], metrics: Sequence[str]) -> None:
    """rouge_score for each pair, and nothing else."""
    stem = metrics[0].endswith("_stem")
    scorer = rouge_scorer.RougeScorer(list(ROUGE_METRICS), use_stemmer=stem)
    for path in paths:
        for row in read_json_lines(path):
            scorer.score(row["references"][0], row["prediction"])


def bootstrap_cells(values: np.ndarray, resamples: int) -> None:
    """Each cell's resamples by themselves."""
    for row in values:
        drawn = np.random.default_rng(0).integers(row.size, size=(resamples, row.size))
        np.percentile(row[drawn].mean(axis=1), [2.5, 97.5])


def compare_times(
    name: str, cells: int, run_ours: Callable[[], object], run_baseline: Callable[[], object]
) -> dict[str, float]:
    """Seconds of `work` on all cells, and of the plain way, scaled up from `COMPARED` of them."""
    clock, own = time.perf_counter(), time.process_time()
    run_ours()
    clock, own, start = time.perf_counter() - clock, time.process_time() - own, time.process_time()
    run_baseline()
    other = (time.process_time() - start) * cells / min(BASELINE_CELLS, cells)
    print(
        f"{name}: {cells} cells, {own:.1f} s ({clock:.1f} s by the clock), {own / other:.2f} x the plain way"
    )
    return {"cells": cells, "cpu_s": own, "clock_s": clock, "plain_cpu_s": other, "ratio": own / other}


def measure_all(cells: int, rescored_cells: int, examples: int, resamples: int) -> dict[str, Any]:
    """Rescoring of `judged` cells, without and with stemming, and the bootstrap of `cells`."""
    values = np.random.default_rng(0).uniform(0, 100, size=(cells, examples))
    found: dict[str, Any] = {
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
            found[f"rouge{ending}"] = compare_times(
                f"rouge{ending}",
                rescored_cells,
                partial(rescore_files, paths, metrics),
                partial(score_pairs, paths[:BASELINE_CELLS], metrics),
            )
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="20 cells of 50 predictions, 1,000 resamples")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with hardware and versions")
    parser.add_argument("--cells", type=int, default=1_000, help="that are rescored")
    asked = parser.parse_args()
    found = measure_all(20, 20, 50, 1_000) if asked.small else measure_all(1_000, asked.cells, 500, 10_000)
    if asked.out is not None:
        packages = ("gkd-lab", "rouge-score", "nltk", "numpy")
        versions = {name: version(name) for name in packages}
        threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        write_json(
            asked.out, {"device": platform.machine(), "threads": threads, "versions": versions, **found}
        )
        print(f"written to {asked.out}")


if __name__ == "__main__":
    main()
