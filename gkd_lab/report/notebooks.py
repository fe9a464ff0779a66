"""Functions of the notebooks in `analysis/`: an experiment's table, the paper's numbers, gains, verdicts.

A notebook reads a table that `gkd-lab table` wrote, so that it needs no run.
"""

import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from gkd_lab.claims.judge import judge_paper, judge_table, load_example_lookup
from gkd_lab.claims.paper import load_values
from gkd_lab.claims.verdict_text import format_detail, format_verdict, format_verdict_lines
from gkd_lab.config import Grid
from gkd_lab.figures.panels import GAIN_PREFIX
from gkd_lab.statistics.example_scores import ExampleLookup
from gkd_lab.tables.cell_facts import FACT_COLUMNS
from gkd_lab.tables.load_table import read_table_file
from gkd_lab.tables.long_table import COLUMN_TYPES, LEADING_COLUMNS, SCORE_COLUMNS, TRAILING_COLUMNS
from gkd_lab.tables.scores import PAPER_SOURCE, SOURCE_AXIS, select_scores

_CELL_COLUMNS = [
    "figure",
    "task",
    "student",
    "teacher_temperature",
    "train_share",
    "method",
    "lmbda",
    "divergence",
    "beta",
]
"""Columns of the paper's numbers that tell its cells apart."""
_REFERENCE_COLUMNS = (
    "scale", "task", "student", "teacher", "evaluation", "decoding", "temperature", "split", "metric",
    "evaluation_status", "origin",
)  # fmt: skip


def read_table(name: str) -> pd.DataFrame:
    """Read an experiment's long table: `NAME.parquet` in the folder `$GKD_LAB_TABLES`, else in `tables`.

    `gkd-lab table NAME --format parquet -o analysis/tables/NAME.parquet` writes it. Raises ConfigError.
    """
    return read_table_file(_get_table_path(name))


def read_example_lookup(name: str) -> ExampleLookup:
    """Return the lookup of the examples beside an experiment's table; an empty one if there are none."""
    return load_example_lookup(_get_table_path(name))[0]


def _get_table_path(name: str) -> Path:
    """Return the path of an experiment's table."""
    return Path(os.environ.get("GKD_LAB_TABLES", "tables")) / f"{name}.parquet"


def add_gain(table: pd.DataFrame, metric: str, evaluation: str | None = None) -> pd.DataFrame:
    """Return the long table with rows of one more metric, `gain in <metric>`: minus the SFT student's score.

    `metric` and `evaluation` are as in `select_scores`. NaN in the teachers' rows, and where the SFT student
    has no score. The bounds are shifted as if that score were exact: it is one model, shared by all seeds.
    Raises ConfigError for a score that the table has not.
    """
    scores = select_scores(table, metric, evaluation)
    starts = scores[scores["role"] == "start"].set_index("cell")["value"]
    start_scores = scores["cell"].where(scores["role"] == "start", scores["start_cell"]).map(starts)
    gains = {name: scores[name] - start_scores for name in ("value", "low", "high")}
    gain_rows = scores.assign(metric=f"{GAIN_PREFIX}{scores['metric'].iloc[0]}", **gains)
    return pd.concat([table, gain_rows], ignore_index=True)


def format_verdicts(frame: pd.DataFrame, grid: Grid) -> Iterator[str]:
    """Yield lines per claim that the experiment names: its verdict on the table and on the paper.

    Examples' scores are read from `NAME.examples.parquet` beside the experiment's table, if there are any.
    """
    names = grid.experiment.paper.claims
    verdicts = judge_table(frame, names, *load_example_lookup(_get_table_path(grid.name)))
    for verdict, paper_verdict in zip(verdicts, judge_paper(names), strict=True):
        yield from format_verdict_lines([verdict], names)
        text = f"The paper's own numbers: {format_verdict(paper_verdict)}; {format_detail(paper_verdict)}"
        yield from textwrap.wrap(text, 110, initial_indent=" " * 16, subsequent_indent=" " * 16)
        yield ""


def combine_with_paper(run: pd.DataFrame, *papers: pd.DataFrame) -> pd.DataFrame:
    """Return one long table of the run's rows, then the paper's, told apart by the axis `of`.

    It has the axes of all.
    """
    frames = [run.assign(**{SOURCE_AXIS: "this run"}), *papers]
    axes = dict.fromkeys(axis for frame in (run, *papers) for axis in _list_axis_columns(frame))
    return _arrange_columns(pd.concat(frames, ignore_index=True), list(axes))


def _list_axis_columns(table: pd.DataFrame) -> list[str]:
    """Return the columns of a long table's declared axes that have no fixed column."""
    columns = list(table.columns)
    return columns[columns.index(LEADING_COLUMNS[-1]) + 1 : columns.index(SCORE_COLUMNS[0])]


def _arrange_columns(table: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """Return a long table with all of its columns, in order and of their types; missing ones are null."""
    facts = [name for name in FACT_COLUMNS if name not in axes]
    columns = [*LEADING_COLUMNS, *axes, *SCORE_COLUMNS, *facts, *TRAILING_COLUMNS]
    types = {name: COLUMN_TYPES[name] for name in columns if name in COLUMN_TYPES and name not in axes}
    return table.reindex(columns=columns).astype({**types, "stands_for": "object"})


def load_paper_table(*figures: str, axes: Sequence[str] = (), students: Sequence[str] = ()) -> pd.DataFrame:
    """Load the paper's numbers of some figures as a long table, with the axis `of`.

    `axes` are further axes: `method`, `teacher_temperature` or `train_rows`; `students` the sizes to load,
    by default all. A stated gain is added to its SFT student's score. On-policy KD is called `gkd`, which it
    is at forward KL. XSum has 200,000 rows here, the paper's own round number (1,000 are 0.5 per cent).
    """
    values = load_values()
    values = values[values["figure"].isin(figures) & (values["role"] == "cell")]
    values = values[values["student"].isin(students)] if students else values
    scores = values["value"].where(values["form"] == "score", values["start"] + values["value"])
    rows = _describe_paper_rows(values.assign(value=scores))
    if "train_rows" not in axes:
        rows = rows.assign(train_rows=rows["train_rows"].where(rows["train_share"] < 1))  # null: all
    references = [_select_references(rows, role) for role in ("start", "teacher")]
    return _arrange_columns(pd.concat([*references, rows], ignore_index=True), [*axes, SOURCE_AXIS])


def _describe_paper_rows(values: pd.DataFrame) -> pd.DataFrame:
    """Return the long rows of the paper's cells; `start` and `teacher_score` hold the references' scores."""
    is_self = values["figure"] == "A.10"  # self-distillation
    reference = values["figure"] + " " + values["task"] + " " + values["student"]
    return values.assign(
        cell="paper " + values.groupby(_CELL_COLUMNS, dropna=False, sort=False).ngroup().astype(str),
        scale="paper",
        teacher_score=values["teacher"],
        student=values["student"].mask(is_self, "large"),
        teacher=is_self.map({True: "large", False: "xl"}),
        seed=0,
        method=values["method"].replace("on_policy_kd", "gkd"),
        evaluation=_name_evaluations(values),
        split="test",
        text=values["method"].map({"seqkd": "teacher"}).fillna("data"),
        reward=values["alpha"].notna() | (values["method"] == "rlef"),
        distillation_share=values["alpha"],
        anchor=values["method"].map({"rlef": "start"}),
        self_distillation=is_self,
        train_rows=(200_000 * values["train_share"]).round().astype("Int64"),
        start_cell="paper start " + reference,
        teacher_cell="paper teacher " + reference,
        stands_for=None,
        status="done",
        error=None,
        evaluation_status="done",
        origin="requested",
        **{SOURCE_AXIS: PAPER_SOURCE},
    )


def _name_evaluations(values: pd.DataFrame) -> "pd.Series[str]":
    """Return the name that a run's evaluation of the same settings has; null where the paper tells none."""
    sampled = "sample" + values["temperature"].map("{:g}".format)
    name = values["decoding"].replace("beam", "beam4")
    return name.where(values["decoding"] != "sample", sampled)


def _select_references(rows: pd.DataFrame, role: str) -> pd.DataFrame:
    """Return the rows of the starts or teachers of the paper's cells; NaN where it states no score."""
    cell = f"{role}_cell"
    references = rows.drop_duplicates([cell, "evaluation", "metric"], keep="last")
    values = references["start" if role == "start" else "teacher_score"]
    is_known = values.notna().groupby(references[cell]).transform("any")
    return references[[*_REFERENCE_COLUMNS, SOURCE_AXIS]].assign(
        cell=references[cell],
        role=role,
        value=values,
        status=is_known.map({True: "done", False: "missing"}),
    )
