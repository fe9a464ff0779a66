"""What the notebooks of `analysis/` call: an experiment's table, the paper's numbers in the same form, gains.

A notebook reads a table that was written with `gkd-lab table`, so that it needs no run of its own.
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
"""The axis that tells a run from the paper in a frame that holds both."""

_JSON_COLUMNS = ("evaluations", "stands_for")
_PLACE_COLUMNS = [
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
    """The table of an experiment: `NAME.parquet` in the folder `GKD_LAB_TABLES`, else in `tables` here.

    Written by `gkd-lab table NAME --format parquet -o analysis/tables/NAME.parquet`. Raises SpecError.
    """
    path = Path(os.environ.get("GKD_LAB_TABLES", "tables")) / f"{name}.parquet"
    if not path.is_file():
        raise ConfigError(f"no table {path}: gkd-lab table {name} --format parquet -o {path}")
    frame = pd.read_parquet(path)
    for column in _JSON_COLUMNS:
        frame[column] = [None if pd.isna(text) else json.loads(text) for text in frame[column]]
    return frame


def add_gain(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The table with a column `gain in <metric>`: a cell's score minus that of the student it started from.

    Null in the teachers' rows, and where the start has no score. Bounds move along, as if the start were
    known exactly: it is one model, shared by all seeds.
    """
    starts = frame[frame["role"] == "start"].set_index("cell")[metric]
    own = frame["cell"].where(frame["role"] == "start", frame["start_cell"])
    gained = {
        f"gain in {_shorten_metric(metric)}{bound}": frame[f"{metric}{bound}"] - own.map(starts)
        for bound in ("", ".low", ".high")
        if f"{metric}{bound}" in frame
    }
    return frame.assign(**gained)


def format_verdicts(frame: pd.DataFrame, grid: Grid) -> Iterator[str]:
    """Each claim that the experiment names: its verdict on the table, and on the paper's own numbers."""
    claims = [CLAIMS[name] for name in grid.experiment.paper.claims]
    facts = extract_measurements(frame, {cell.fingerprint: cell for cell in grid.cells})
    for ours, paper in zip(judge(claims, facts), judge_paper(claims), strict=True):
        yield from format_verdict_lines([ours], [ours.claim.id])
        told = f"The paper's own numbers: {format_verdict(paper)}; {paper.detail}"
        yield from textwrap.wrap(told, 110, initial_indent=" " * 16, subsequent_indent=" " * 16)
        yield ""


def combine_with_paper(run: pd.DataFrame, *papers: pd.DataFrame) -> pd.DataFrame:
    """A run's table and the paper's numbers as one, told apart by the axis `of`."""
    run = run.copy()
    run.insert(list(run.columns).index("status"), SOURCE_AXIS, "this run")
    frames = [frame.dropna(axis="columns", how="all") for frame in (run, *papers)]
    columns = dict.fromkeys(name for frame in (run, *papers) for name in frame.columns)
    return pd.concat(frames, ignore_index=True).reindex(columns=list(columns))


def load_paper_table(*figures: str, axes: Sequence[str] = (), students: Sequence[str] = ()) -> pd.DataFrame:
    """The paper's numbers of some figures in the form of `table`, so that every figure can draw them.

    `axes` are further columns, of `method`, `student`, `teacher_temperature` and `train_rows`; `students`
    the sizes to take, by default all. A score stands under `<decoding>/<metric>`, and under `<metric>`
    where its figure has one decoding for the task. On-policy KD is called `gkd`, which it is at forward KL.
    The 200,000 rows of XSum are the paper's own round number (1,000 are 0.5 per cent).
    """
    found = load_values()
    found = found[found["figure"].isin(figures) & (found["role"] == "cell")]
    found = found[found["student"].isin(students)] if students else found
    rows = [
        *_build_reference_rows(found, "start"),
        *_build_reference_rows(found, "teacher"),
        *_build_cell_rows(found),
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
    grouped = paper_values.groupby(_PLACE_COLUMNS, dropna=False, sort=False)
    return [
        {
            **dict(zip(_PLACE_COLUMNS, place, strict=True)),
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
        for number, (place, group) in enumerate(grouped)
    ]


def _build_reference_rows(paper_values: pd.DataFrame, role: str) -> list[dict[str, Any]]:
    """A row a figure, task and student; without scores where the paper states none."""
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
    return group["value"].where(group["form"] == "score", group["start"] + group["value"])


def _name_scores(
    group: pd.DataFrame, scores: "pd.Series[float]", paper_values: pd.DataFrame
) -> dict[str, float]:
    named: dict[str, float] = {}
    first = group.iloc[0]
    of_figure = paper_values[
        (paper_values["figure"] == first["figure"]) & (paper_values["task"] == first["task"])
    ]
    single = len(of_figure[["decoding", "temperature"]].drop_duplicates()) == 1
    for (_, row), score in zip(group.iterrows(), scores, strict=True):
        detail = {"sample": f"{row['temperature']:g}", "beam": "4"}.get(row["decoding"], "")
        named[f"{row['decoding']}{detail}/{row['metric']}"] = score
        if single:
            named[row["metric"]] = score
    return named


def _format_reference_name(row: "pd.Series[Any]", role: str) -> str:
    return f"paper {role} {row['figure']} {row['task']} {row['student']}"


def _shorten_metric(metric: str) -> str:
    return metric.rsplit("/", 1)[-1]


__all__ = [
    "SOURCE_AXIS",
    "add_gain",
    "combine_with_paper",
    "format_verdicts",
    "load_paper_table",
    "read_table",
]
