"""Judge claims on a run: its table and the scores of its stored predictions."""

from collections.abc import Iterable, Mapping
from functools import cache

import numpy as np

from gkd_lab.claims.judge import judge_table
from gkd_lab.claims.model_scores import ExampleLookup, ExampleScores, ScoreKey
from gkd_lab.claims.verdicts import ClaimVerdict
from gkd_lab.config import Grid
from gkd_lab.config.cell import AnyEvaluation
from gkd_lab.store import Record, Store
from gkd_lab.tables.example_statistics import load_example_statistics
from gkd_lab.tables.examples import compute_pseudo_values
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.results import name_evaluations


def judge_run(grid: Grid, store: Store, claims: Iterable[str] | None = None) -> list[ClaimVerdict]:
    """Judge claims (ids; None: all) on a run's finished cells; one verdict per claim, in order."""
    return judge_table(build_long_table(grid, store), claims, build_example_lookup(grid, store))


def build_example_lookup(grid: Grid, store: Store) -> ExampleLookup:
    """Return a cached lookup of examples' scores in the stored predictions; None where there are none."""
    evaluations = _index_evaluations(grid, store)

    @cache
    def find_examples(key: ScoreKey) -> ExampleScores | None:
        """Load the scores of one model's examples under one evaluation and metric."""
        cell, evaluation, metric = key
        if (cell, evaluation) not in evaluations:
            return None
        statistics = load_example_statistics(*evaluations[cell, evaluation], metric)
        if statistics is None:
            return None
        return ExampleScores(np.arange(len(statistics)), compute_pseudo_values(statistics))

    return find_examples


def _index_evaluations(
    grid: Grid, store: Store
) -> Mapping[tuple[str | None, str | None], tuple[Record, AnyEvaluation]]:
    """Map (fingerprint, evaluation's name) to (record, evaluation); starts and teachers too."""
    index: dict[tuple[str | None, str | None], tuple[Record, AnyEvaluation]] = {}
    for cell in grid.cells:
        names = name_evaluations(cell.evaluations)
        start, teacher = cell.training.start, cell.training.teacher
        for fingerprint, record in (
            (cell.fingerprint, store.get_record(cell)),
            (start.fingerprint, store.get_artifact(cell.scale, "start", start)),
            (teacher.fingerprint, store.get_artifact(cell.scale, "teacher", teacher)),
        ):
            for evaluation in cell.evaluations:
                index[fingerprint, names[evaluation.folder]] = (record, evaluation)
    return index
