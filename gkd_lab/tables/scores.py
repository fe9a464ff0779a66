"""Choose one score of each model from the long table, by the columns `evaluation` and `metric`."""

import pandas as pd

from gkd_lab.config.errors import ConfigError, build_unknown_name_error

SOURCE_AXIS = "of"
"""Axis that tells the rows of several tables in one frame apart, such as a run's and the paper's."""
PAPER_SOURCE = "the paper"
"""Value of that axis in the rows of the paper's numbers."""
_MODEL_COLUMNS = ["role", "cell"]
_SCORE_COLUMNS = ("value", "low", "high", "n_examples")
_EVALUATION_COLUMNS = ("evaluation", "decoding", "temperature", "split", "metric")


def select_scores(
    table: pd.DataFrame, metric: str, evaluation: str | None = None, task: str | None = None
) -> pd.DataFrame:
    """Return one row per model: `value`, `low` and `high` of a metric, with all columns of the long table.

    `evaluation` is a name of the column `evaluation`; None means each task's first one that has the metric.
    `metric` may also be `<evaluation>/<metric>`. Tasks without the metric are left out, and a model without
    the score has NaN. Raises ConfigError for a frame that is no long table, for an unknown task, evaluation
    or metric, naming the valid ones, where a model has several rows of the score, and where a task has rows
    of several scales that the axis `of` does not tell apart.
    """
    _check_columns(table)
    if task is not None and task not in set(table["task"]):
        raise build_unknown_name_error("task", task, table["task"].unique())
    rows = (table if task is None else table[table["task"] == task]).reset_index(drop=True)
    evaluation, metric = _resolve_names(rows, metric, evaluation)
    keys = ["task", *([SOURCE_AXIS] if SOURCE_AXIS in rows else [])]
    groups = [group for _, group in rows.groupby(keys, sort=False, dropna=False)]
    for group in groups:
        _check_one_scale(group)
    parts = [_select_task_scores(group, metric, evaluation) for group in groups]
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def select_primary_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Return `select_scores` of every task by the first metric of its first evaluation.

    Raises ConfigError for a frame that is no long table or has no evaluation.
    """
    _check_columns(table)
    rows = table[table["evaluation"].notna()]
    if rows.empty:
        raise ConfigError("the table has no evaluation")
    first = rows.drop_duplicates("task")[["task", "evaluation", "metric"]].itertuples(index=False)
    parts = [select_scores(table, metric, evaluation, task) for task, evaluation, metric in first]
    return pd.concat(parts, ignore_index=True)


def list_score_names(table: pd.DataFrame) -> list[str]:
    """Return the names `<evaluation>/<metric>` of a table's scores; a metric of no evaluation by itself."""
    return list(_join_names(table[["evaluation", "metric"]].drop_duplicates()).dropna())


def _check_columns(table: pd.DataFrame) -> None:
    """Check that a frame has the columns of a long table. Raises ConfigError."""
    needed = ("task", *_MODEL_COLUMNS, *_EVALUATION_COLUMNS, *_SCORE_COLUMNS)
    missing = [name for name in needed if name not in table]
    if missing:
        raise ConfigError(f"no long table: it has no column {', '.join(missing)}; gkd_lab.table makes one")


def _join_names(pairs: pd.DataFrame) -> "pd.Series[str]":
    """Return `<evaluation>/<metric>` of each row, `<metric>` where it has no evaluation."""
    return (pairs["evaluation"] + "/" + pairs["metric"]).fillna(pairs["metric"])


def _resolve_names(rows: pd.DataFrame, metric: str, evaluation: str | None) -> tuple[str | None, str]:
    """Return (evaluation or None, metric) of a score that the rows have. Raises ConfigError."""
    pairs = rows[["evaluation", "metric"]].drop_duplicates()
    if evaluation is not None:
        if evaluation not in set(pairs["evaluation"]):
            raise build_unknown_name_error("evaluation", evaluation, pairs["evaluation"].dropna().unique())
        metrics = pairs.loc[pairs["evaluation"] == evaluation, "metric"]
        if metric not in set(metrics):
            raise build_unknown_name_error(f"metric of {evaluation}", metric, metrics)
        return evaluation, metric
    if metric in set(pairs["metric"]):
        return None, metric
    named = pairs[_join_names(pairs) == metric]
    if named.empty:
        raise build_unknown_name_error("metric", metric, list_score_names(pairs))
    return str(named["evaluation"].iloc[0]), str(named["metric"].iloc[0])


def _select_task_scores(rows: pd.DataFrame, metric: str, evaluation: str | None) -> pd.DataFrame:
    """Return the row of each model of one task, blank where it has no such score; no rows if none has."""
    matching = rows[rows["metric"] == metric]
    if evaluation is None:  # all rows tell the order: the first model may lack what later ones have
        available = set(matching["evaluation"].dropna())
        evaluation = next((name for name in rows["evaluation"].unique() if name in available), None)
    names = matching["evaluation"]
    scores = matching[names.isna() if evaluation is None else names == evaluation]
    _check_one_row_per_model(scores, metric)
    models = rows.drop_duplicates(_MODEL_COLUMNS)
    if scores.empty or len(models) == len(scores):
        return scores
    values = {name: scores[name].iloc[0] for name in _EVALUATION_COLUMNS} | dict.fromkeys(_SCORE_COLUMNS)
    blank = models.assign(**values).astype(scores.dtypes)
    return pd.concat([scores, blank]).drop_duplicates(_MODEL_COLUMNS).sort_index()


def _check_one_scale(rows: pd.DataFrame) -> None:
    """Check that the rows of a task are of one scale: two models of two are no seeds. Raises ConfigError."""
    scales = list(rows["scale"].dropna().unique()) if "scale" in rows else []
    if len(scales) > 1:
        raise ConfigError(
            f"{rows['task'].iloc[0]} has rows of the scales {', '.join(scales)}: choose one, or tell them "
            f"apart by a column {SOURCE_AXIS!r} before `evaluation`"
        )


def _check_one_row_per_model(scores: pd.DataFrame, metric: str) -> None:
    """Check that no model has two rows of a score. Raises ConfigError."""
    duplicated = scores[scores.duplicated(_MODEL_COLUMNS)]
    if len(duplicated):
        first = duplicated.iloc[0]
        raise ConfigError(
            f"{first['role']} {first['cell']} has several rows of {metric!r}; drop the {len(duplicated)} "
            "duplicated rows of the table first"
        )
