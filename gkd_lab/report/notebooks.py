"""Functions of the notebooks in `analysis/`: an experiment's table, the paper's numbers, gains, verdicts.

A notebook reads a table that `gkd-lab table` wrote, so that it needs no run.
"""

import json
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gkd_lab.claims.definitions import CLAIMS
from gkd_lab.claims.judge import judge, judge_paper
from gkd_lab.claims.measurements import extract_measurements
from gkd_lab.claims.paper import load_values
from gkd_lab.claims.verdicts import format_verdict, format_verdict_lines
from gkd_lab.config import Grid
from gkd_lab.config.errors import ConfigError

SOURCE_AXIS = "of"
"""Axis that tells a run from the paper in a table with rows of both."""

_JSON_COLUMNS = ("evaluations", "stands_for")
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


def read_table(name: str) -> pd.DataFrame:
    """Read an experiment's table: `NAME.parquet` in the folder `$GKD_LAB_TABLES`, else in `tables`.

    `gkd-lab table NAME --format parquet -o analysis/tables/NAME.parquet` writes it. Raises ConfigError.
    """
    path = Path(os.environ.get("GKD_LAB_TABLES", "tables")) / f"{name}.parquet"
    if not path.is_file():
        raise ConfigError(f"no table {path}: gkd-lab table {name} --format parquet -o {path}")
    frame = pd.read_parquet(path)
    for column in _JSON_COLUMNS:
        frame[column] = [None if pd.isna(text) else json.loads(text) for text in frame[column]]
    return frame


def add_gain(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return a copy with `gain in <metric>` and its bounds: a score minus its SFT student's.

    Null in the teachers' rows, and where the SFT student has no score. The bounds are shifted as if that
    score were exact: it is one model, shared by all seeds.
    """
    starts = frame[frame["role"] == "start"].set_index("cell")[metric]
    start_cells = frame["cell"].where(frame["role"] == "start", frame["start_cell"])
    name = metric.rsplit("/", 1)[-1]
    gains = {
        f"gain in {name}{bound}": frame[f"{metric}{bound}"] - start_cells.map(starts)
        for bound in ("", ".low", ".high")
        if f"{metric}{bound}" in frame
    }
    return frame.assign(**gains)


def format_verdicts(frame: pd.DataFrame, grid: Grid) -> Iterator[str]:
    """Yield lines per claim that the experiment names: its verdict on the table and on the paper."""
    claims = [CLAIMS[name] for name in grid.experiment.paper.claims]
    measurements = extract_measurements(frame, {cell.fingerprint: cell for cell in grid.cells})
    verdicts, paper_verdicts = judge(claims, measurements), judge_paper(claims)
    for verdict, paper_verdict in zip(verdicts, paper_verdicts, strict=True):
        yield from format_verdict_lines([verdict], [verdict.claim.id])
        text = f"The paper's own numbers: {format_verdict(paper_verdict)}; {paper_verdict.detail}"
        yield from textwrap.wrap(text, 110, initial_indent=" " * 16, subsequent_indent=" " * 16)
        yield ""


def combine_with_paper(run: pd.DataFrame, *papers: pd.DataFrame) -> pd.DataFrame:
    """Return one table of the run's rows, then the paper's, told apart by the axis `of`."""
    run = run.copy()
    run.insert(list(run.columns).index("status"), SOURCE_AXIS, "this run")
    frames = [frame.dropna(axis="columns", how="all") for frame in (run, *papers)]
    columns = dict.fromkeys(name for frame in (run, *papers) for name in frame.columns)
    return pd.concat(frames, ignore_index=True).reindex(columns=list(columns))


def load_paper_table(*figures: str, axes: Sequence[str] = (), students: Sequence[str] = ()) -> pd.DataFrame:
    """Load the paper's numbers of some figures as a table with the columns of a run's table.

    `axes` are further columns: `method`, `student`, `teacher_temperature` or `train_rows`; `students` the
    sizes to load, by default all. A score is in the column `<decoding>/<metric>`, and in `<metric>` where
    its figure has one decoding for the task. On-policy KD is called `gkd`, which it is at forward KL.
    XSum has 200,000 rows here, the paper's own round number (1,000 are 0.5 per cent).
    """
    values = load_values()
    values = values[values["figure"].isin(figures) & (values["role"] == "cell")]
    values = values[values["student"].isin(students)] if students else values
    rows = [
        *_build_reference_rows(values, "start"),
        *_build_reference_rows(values, "teacher"),
        *_build_cell_rows(values),
    ]
    columns = ["cell", "role", "task", "lmbda", "beta", "seed", *axes, SOURCE_AXIS, "status"]
    scores = dict.fromkeys(name for row in rows for name in row["scores"])
    for row in rows:
        row[SOURCE_AXIS] = "the paper" if "student" in axes else f"the paper ({row['student']})"
        row.update(row["scores"])
    columns += [*scores, "start_cell", "teacher_cell", "stands_for"]
    frame = pd.DataFrame(rows, columns=columns).astype({"lmbda": "float64", "beta": "float64"})
    return frame.astype({"train_rows": "Int64"}) if "train_rows" in axes else frame


def _build_cell_rows(paper_values: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a dict per cell of the paper's figures, its scores as a dict in `scores`."""
    grouped = paper_values.groupby(_CELL_COLUMNS, dropna=False, sort=False)
    return [
        {
            **dict(zip(_CELL_COLUMNS, settings, strict=True)),
            "cell": f"paper {number}",
            "role": "cell",
            "seed": 0,
            "status": "done",
            "method": str(group["method"].iloc[0]).replace("on_policy_kd", "gkd"),
            "train_rows": round(200_000 * group["train_share"].iloc[0]),
            "start_cell": _format_reference_name(group.iloc[0], "start"),
            "teacher_cell": _format_reference_name(group.iloc[0], "teacher"),
            "scores": _name_scores(group, _compute_scores(group), paper_values),
        }
        for number, (settings, group) in enumerate(grouped)
    ]


def _build_reference_rows(paper_values: pd.DataFrame, role: str) -> list[dict[str, Any]]:
    """Return a dict per figure, task and student; `scores` are NaN where the paper states none."""
    return [
        {
            "cell": _format_reference_name(group.iloc[0], role),
            "role": role,
            "task": task,
            "student": student,
            "status": "done" if group[role].notna().any() else "missing",
            "scores": _name_scores(group, group[role], paper_values),
        }
        for (_, task, student), group in paper_values.groupby(["figure", "task", "student"], sort=False)
    ]


def _compute_scores(group: pd.DataFrame) -> "pd.Series[float]":
    """Return a score per number of the paper; a stated gain is added to its SFT student's score."""
    return group["value"].where(group["form"] == "score", group["start"] + group["value"])


def _name_scores(
    group: pd.DataFrame, scores: "pd.Series[float]", paper_values: pd.DataFrame
) -> dict[str, float]:
    """Map `<decoding>/<metric>` to its score, and `<metric>` too if the figure has one decoding."""
    named_scores: dict[str, float] = {}
    first = group.iloc[0]
    same_figure = (paper_values["figure"] == first["figure"]) & (paper_values["task"] == first["task"])
    has_one_decoding = len(paper_values[same_figure][["decoding", "temperature"]].drop_duplicates()) == 1
    for (_, row), score in zip(group.iterrows(), scores, strict=True):
        detail = {"sample": f"{row['temperature']:g}", "beam": "4"}.get(row["decoding"], "")
        named_scores[f"{row['decoding']}{detail}/{row['metric']}"] = score
        if has_one_decoding:
            named_scores[row["metric"]] = score
    return named_scores


def _format_reference_name(row: "pd.Series[Any]", role: str) -> str:
    """Return `paper <role> <figure> <task> <student>`, used in place of a fingerprint."""
    return f"paper {role} {row['figure']} {row['task']} {row['student']}"
