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
from gkd_lab.claims.facts import of_table
from gkd_lab.claims.judge import judge, judge_paper
from gkd_lab.claims.paper import values
from gkd_lab.claims.verdict_text import text_lines, verdict_of
from gkd_lab.config import GridOfCells
from gkd_lab.config.errors import SpecError

OF = "of"
"""The axis that tells a run from the paper in a frame that holds both."""

_JSON = ("evaluations", "stands_for")
_PLACE = [
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
        raise SpecError(f"no table {path}: gkd-lab table {name} --format parquet -o {path}")
    frame = pd.read_parquet(path)
    for column in _JSON:
        frame[column] = [None if pd.isna(text) else json.loads(text) for text in frame[column]]
    return frame


def with_gain(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The table with a column `gain in <metric>`: a cell's score minus that of the student it started from.

    Null in the teachers' rows, and where the start has no score. Bounds move along, as if the start were
    known exactly: it is one model, shared by all seeds.
    """
    starts = frame[frame["role"] == "start"].set_index("cell")[metric]
    own = frame["cell"].where(frame["role"] == "start", frame["start_cell"])
    gained = {
        f"gain in {_short(metric)}{bound}": frame[f"{metric}{bound}"] - own.map(starts)
        for bound in ("", ".low", ".high")
        if f"{metric}{bound}" in frame
    }
    return frame.assign(**gained)


def verdict_lines(frame: pd.DataFrame, grid: GridOfCells) -> Iterator[str]:
    """Each claim that the experiment names: its verdict on the table, and on the paper's own numbers."""
    claims = [CLAIMS[name] for name in grid.experiment.paper.claims]
    facts = of_table(frame, {cell.fingerprint: cell for cell in grid.cells})
    for ours, paper in zip(judge(claims, facts), judge_paper(claims), strict=True):
        yield from text_lines([ours], [ours.claim.id])
        told = f"The paper's own numbers: {verdict_of(paper)}; {paper.detail}"
        yield from textwrap.wrap(told, 110, initial_indent=" " * 16, subsequent_indent=" " * 16)
        yield ""


def beside(run: pd.DataFrame, *papers: pd.DataFrame) -> pd.DataFrame:
    """A run's table and the paper's numbers as one, told apart by the axis `of`."""
    run = run.copy()
    run.insert(list(run.columns).index("status"), OF, "this run")
    frames = [frame.dropna(axis="columns", how="all") for frame in (run, *papers)]
    columns = dict.fromkeys(name for frame in (run, *papers) for name in frame.columns)
    return pd.concat(frames, ignore_index=True).reindex(columns=list(columns))


def paper_table(*figures: str, axes: Sequence[str] = (), students: Sequence[str] = ()) -> pd.DataFrame:
    """The paper's numbers of some figures in the form of `table`, so that every figure can draw them.

    `axes` are further columns, of `method`, `student`, `teacher_temperature` and `train_rows`; `students`
    the sizes to take, by default all. A score stands under `<decoding>/<metric>`, and under `<metric>`
    where its figure has one decoding for the task. On-policy KD is called `gkd`, which it is at forward KL.
    The 200,000 rows of XSum are the paper's own round number (1,000 are 0.5 per cent).
    """
    found = values()
    found = found[found["figure"].isin(figures) & (found["role"] == "cell")]
    found = found[found["student"].isin(students)] if students else found
    rows = [*_references(found, "start"), *_references(found, "teacher"), *_cells(found)]
    columns = ["cell", "role", "task", "lmbda", "beta", "seed", *axes, OF, "status"]
    scores = dict.fromkeys(name for row in rows for name in row["scores"])
    for row in rows:
        row[OF] = "the paper" if "student" in axes else f"the paper ({row['student']})"
        row.update(row["scores"])
    columns += [*scores, "start_cell", "teacher_cell", "stands_for"]
    frame = pd.DataFrame(rows, columns=columns).astype({"lmbda": "float64", "beta": "float64"})
    return frame.astype({"train_rows": "Int64"}) if "train_rows" in axes else frame


def _cells(found: pd.DataFrame) -> list[dict[str, Any]]:
    grouped = found.groupby(_PLACE, dropna=False, sort=False)
    return [
        {
            **dict(zip(_PLACE, place, strict=True)),
            "cell": f"paper {number}",
            "role": "cell",
            "seed": 0,
            "status": "done",
            "method": str(group["method"].iloc[0]).replace("on_policy_kd", "gkd"),
            "train_rows": round(200_000 * group["train_share"].iloc[0]),
            "start_cell": _reference_name(group.iloc[0], "start"),
            "teacher_cell": _reference_name(group.iloc[0], "teacher"),
            "scores": _scores(group, _score(group), found),
        }
        for number, (place, group) in enumerate(grouped)
    ]


def _references(found: pd.DataFrame, role: str) -> list[dict[str, Any]]:
    """A row a figure, task and student; without scores where the paper states none."""
    return [
        {
            "cell": _reference_name(group.iloc[0], role),
            "role": role,
            "task": task,
            "student": student,
            "status": "done" if group[role].notna().any() else "missing",
            "scores": _scores(group, group[role], found),
        }
        for (_, task, student), group in found.groupby(["figure", "task", "student"], sort=False)
    ]


def _score(group: pd.DataFrame) -> "pd.Series[float]":
    return group["value"].where(group["form"] == "score", group["start"] + group["value"])


def _scores(group: pd.DataFrame, scores: "pd.Series[float]", found: pd.DataFrame) -> dict[str, float]:
    named: dict[str, float] = {}
    first = group.iloc[0]
    of_figure = found[(found["figure"] == first["figure"]) & (found["task"] == first["task"])]
    single = len(of_figure[["decoding", "temperature"]].drop_duplicates()) == 1
    for (_, row), score in zip(group.iterrows(), scores, strict=True):
        detail = {"sample": f"{row['temperature']:g}", "beam": "4"}.get(row["decoding"], "")
        named[f"{row['decoding']}{detail}/{row['metric']}"] = score
        if single:
            named[row["metric"]] = score
    return named


def _reference_name(row: "pd.Series[Any]", role: str) -> str:
    return f"paper {role} {row['figure']} {row['task']} {row['student']}"


def _short(metric: str) -> str:
    return metric.rsplit("/", 1)[-1]


__all__ = ["OF", "beside", "paper_table", "read_table", "verdict_lines", "with_gain"]
