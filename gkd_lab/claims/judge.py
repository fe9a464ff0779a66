"""Judge claims on a long table, on a run, or on the paper's numbers."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from gkd_lab.claims.definitions import CLAIMS, Claim
from gkd_lab.claims.model_scores import ModelScores, load_paper_scores
from gkd_lab.claims.table_scores import load_table_scores
from gkd_lab.claims.verdict_text import VERDICT_COLUMNS, summarize_verdict
from gkd_lab.claims.verdicts import ClaimVerdict, judge_claim
from gkd_lab.config import Grid
from gkd_lab.config.errors import build_unknown_name_error
from gkd_lab.statistics.example_scores import (
    ExampleLookup,
    build_example_lookup,
    find_no_examples,
    index_examples,
)
from gkd_lab.store import Store
from gkd_lab.tables.examples import get_examples_path, read_examples
from gkd_lab.tables.load_table import read_table_file
from gkd_lab.tables.long_table import build_long_table


def judge(
    table: pd.DataFrame, claims: Iterable[str] | None = None, examples: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Judge claims on a long table, and return a row per claim.

    Columns: `id`, `verdict` (holds, fails, undecided), `effect` of the weakest contrast and the 95 % interval
    `low`, `high` of the least effect in points, `n` (seeds), `n_examples` that the interval covers, `margin`,
    `method`, `detail` (`k of n` columns hold, the exceptions, what is missing).

    Args:
        table: The long table.
        claims: Ids such as `["C1", "C5"]`; None: all.
        examples: Scores of examples, `cell, evaluation, metric, example, value` in points; without them
            intervals are over seeds only, and `method` says so.

    Raises:
        ConfigError: for an unknown claim or a table that is not long.
    """
    verdicts = judge_table(table, claims, *index_examples(examples))
    return pd.DataFrame([summarize_verdict(v) for v in verdicts], columns=list(VERDICT_COLUMNS))


def judge_run(grid: Grid, store: Store, claims: Iterable[str] | None = None) -> list[ClaimVerdict]:
    """Judge claims (ids; None: all) on a run's finished cells; one verdict per claim, in order."""
    return judge_table(build_long_table(grid, store), claims, build_example_lookup(grid, store))


def judge_table(
    table: pd.DataFrame,
    claims: Iterable[str] | None = None,
    find_examples: ExampleLookup = find_no_examples,
    problems: tuple[str, ...] = (),
) -> list[ClaimVerdict]:
    """Return a verdict on each claim (ids; None: all) by a long table; `problems` are added to its own."""
    scores = load_table_scores(table, find_examples)
    problems = (*problems, *_describe_unused_examples(scores))
    scores = ModelScores(scores.models, find_examples, (*scores.problems, *problems))
    return [judge_claim(claim, scores) for claim in select_claims(claims)]


def judge_table_file(path: str | Path, claims: Iterable[str] | None = None) -> list[ClaimVerdict]:
    """Return a verdict on each claim by a table's parquet file, and the examples' scores beside it if any.

    Raises ConfigError for a file that holds no table.
    """
    lookup = load_example_lookup(Path(path))
    return judge_table(read_table_file(Path(path)), claims, *lookup)


def load_example_lookup(table: Path) -> tuple[ExampleLookup, tuple[str, ...]]:
    """Return `index_examples` of the examples beside a table's file; an empty lookup if there are none."""
    path = get_examples_path(table)
    return index_examples(read_examples(path) if path.is_file() else None)


def _describe_unused_examples(scores: ModelScores) -> list[str]:
    """Return a note if examples are given, and none of them belongs to a score of the table."""
    if scores.find_examples is find_no_examples:
        return []
    keys = (score.key for model in scores.models for score in model.scores.values())
    is_used = any(key is not None and scores.find_examples(key) is not None for key in keys)
    return [] if is_used or not scores.models else ["no examples of any score of the table are given"]


def judge_paper(claims: Iterable[str] | None = None) -> list[ClaimVerdict]:
    """Return a verdict on each claim (ids; None: all) by the paper's own numbers, by sign."""
    return [
        judge_claim(claim, load_paper_scores(claim.figures), by_sign=True)
        if claim.figures
        else ClaimVerdict(claim, "undecided", reasons=["the paper prints no number of it"])
        for claim in select_claims(claims)
    ]


def select_claims(names: Iterable[str] | None = None) -> list[Claim]:
    """Return the claims of these ids, all for None. Raises ConfigError for an unknown one."""
    selected = list(CLAIMS) if names is None else [names] if isinstance(names, str) else list(names)
    for name in selected:
        if name not in CLAIMS:
            raise build_unknown_name_error("claim", name, CLAIMS)
    return [CLAIMS[name] for name in selected]
