"""Wide form of the long table: a row per model, a column per evaluation and metric."""

from typing import Any

import numpy as np
import pandas as pd

from gkd_lab.tables.long_table import AXIS_COLUMNS, list_axes

_AXES_OF_COLUMNS = {column: axis for axis, column in AXIS_COLUMNS.items()}
_ENDS = {"value": "", "low": ".low", "high": ".high"}
_LM_EVAL_DETAILS = ("lm_eval", "task_hash")


def wide(long: pd.DataFrame) -> pd.DataFrame:
    """Return the wide form of a long table: a row per model, a column per evaluation and metric.

    It equals `build_wide_table` of the same run: `<evaluation>/<metric>` with `.low` and `.high`, also as
    plain `<metric>` for models with one requested evaluation; `evaluations` maps each to its state. Training
    times and facts have no columns. Axes are those of `attrs["axes"]`, else `list_axes`.
    """
    model = long.groupby(["role", "cell"], sort=False).ngroup().to_numpy()
    models = long.iloc[np.unique(model, return_index=True)[1]].reset_index(drop=True)
    scored = long.assign(model=model)[long["evaluation"].notna()]
    axes = long.attrs.get("axes", list_axes(long))
    frame = pd.DataFrame(
        {
            **models[["cell", "role", "task", "lmbda", "beta", "seed", *axes, "status"]],
            "evaluations": _collect_states(scored, len(models)),
            **_build_score_columns(scored, len(models)),
            **models[["start_cell", "teacher_cell", "stands_for", "error"]],
        }
    ).rename(columns=_AXES_OF_COLUMNS)
    frame["stands_for"] = pd.Series(map(_rename_axes, frame["stands_for"]), dtype="object")
    frame.attrs = {name: value for name, value in long.attrs.items() if name != "axes"}
    return frame


def _rename_axes(points: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return grid points with the names of the experiment's axes instead of those of columns."""
    if points is None:
        return None
    return [{_AXES_OF_COLUMNS.get(name, name): value for name, value in point.items()} for point in points]


def _collect_states(scored: pd.DataFrame, count: int) -> list[dict[str, str]]:
    """Return a dict (evaluation -> state) per model."""
    states: list[dict[str, str]] = [{} for _ in range(count)]
    parts = scored.drop_duplicates(["model", "evaluation"])[["model", "evaluation", "evaluation_status"]]
    for model, name, state in parts.to_numpy().tolist():
        states[model][name] = state
    return states


def _build_score_columns(scored: pd.DataFrame, count: int) -> dict[str, Any]:
    """Return the score columns: the requested ones of cells, those of other models, then unrequested ones."""
    scored = scored[scored["metric"].notna()]
    planned = scored[scored["origin"] != "added"].groupby("model")["evaluation"].nunique()
    is_short = (scored["origin"] != "added") & (scored["model"].map(planned) == 1)
    is_requested = scored["origin"] == "requested"
    ranks = np.select([is_requested & (scored["role"] == "cell"), is_requested], [0, 1], 2)
    scored = scored.assign(is_short=is_short, rank=ranks)
    by_pair, by_metric = scored.groupby(["evaluation", "metric"]), scored[is_short].groupby("metric")
    distinct = scored.drop_duplicates(["evaluation", "metric", "is_short", "rank"])
    columns: dict[str, Any] = {}
    order = distinct.sort_values("rank", kind="stable")[["evaluation", "metric", "is_short", "rank"]]
    for evaluation, metric, has_short_name, rank in order.to_numpy().tolist():
        rows = by_pair.get_group((evaluation, metric))
        spread = _spread(f"{evaluation}/{metric}", rows, count, keep_empty=rank < 2)
        if has_short_name:
            spread |= _spread(metric, by_metric.get_group(metric), count, keep_empty=rank < 2)
        spread |= _spread_details(evaluation, rows, count)
        for name, values in spread.items():
            columns.setdefault(name, values)
    return columns


def _spread(name: str, rows: pd.DataFrame, count: int, keep_empty: bool) -> dict[str, Any]:
    """Return columns `name`, `name.low` and `name.high`; bounds that no model has only if `keep_empty`."""
    columns: dict[str, Any] = {}
    for end, suffix in _ENDS.items():
        if keep_empty or end == "value" or rows[end].notna().any():
            columns[name + suffix] = np.full(count, np.nan)
            columns[name + suffix][rows["model"]] = rows[end]
    return columns


def _spread_details(evaluation: str, rows: pd.DataFrame, count: int) -> dict[str, Any]:
    """Return `<evaluation>.lm_eval` and `<evaluation>.task_hash`; nothing for our own evaluations."""
    columns: dict[str, Any] = {}
    for detail in _LM_EVAL_DETAILS:
        detailed = rows[rows[detail].notna()]
        if not detailed.empty:
            values = dict(zip(detailed["model"], detailed[detail], strict=True))
            columns[f"{evaluation}.{detail}"] = [values.get(model) for model in range(count)]
    return columns
