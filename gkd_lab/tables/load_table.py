"""Load the long results table of an experiment from its records, or from a parquet file."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from gkd_lab.config import ConfigError, Grid
from gkd_lab.config.experiment import Scale
from gkd_lab.experiments import Experiment, load_experiment
from gkd_lab.store import Store
from gkd_lab.tables.long_table import LEADING_COLUMNS, SCORE_COLUMNS, build_long_table


def load_table(
    experiment_or_path: Experiment | Grid | str | Path,
    scale: Scale | None = None,
    outputs: str | Path | None = None,
) -> pd.DataFrame:
    """Return the long table of an experiment: a row per model, evaluation and metric.

    Args:
        experiment_or_path: What `gkd_lab.load` returns, an experiment's name, its YAML file or its grid,
            whose records are read; or a parquet file that `gkd-lab table` wrote.
        scale: Scale of the experiment; None: that of its file.
        outputs: Folder of the records; None: that of the loaded experiment, else `outputs`.

    Returns:
        The columns that `build_long_table` describes: `cell`, `role` (cell, start, teacher), `task`, `lmbda`,
        `divergence`, `beta`, the other axes, `evaluation`, `metric`, `value` (in points; seconds of training
        are a metric too) with its 95 % interval over examples `low`, `high`, `status`, ... A missing score is
        a row with NaN.

    Raises:
        ConfigError: (a ValueError) for an unknown experiment, a file that is missing or holds no table, or a
            `scale` or `outputs` where the source has its own.

    Examples:
        >>> scores = gkd_lab.table(gkd_lab.load("quickstart"))
        >>> accuracy = scores[(scores["role"] == "cell") & (scores["metric"] == "accuracy")]
    """
    source = experiment_or_path
    if isinstance(source, Experiment):
        _refuse_setting("scale", scale, "the experiment")
        _refuse_setting("outputs", outputs, "the experiment")
        return build_long_table(source.grid, Store(source.outputs))
    if isinstance(source, Grid):
        _refuse_setting("scale", scale, "the grid")
        return build_long_table(source, Store(Path(outputs or "outputs")))
    if str(source).endswith(".parquet"):
        _refuse_setting("scale", scale, str(source))
        return read_table_file(Path(source))
    return load_table(load_experiment(source, scale, outputs or "outputs"))


def read_table_file(path: Path) -> pd.DataFrame:
    """Return the long table of a parquet file. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"no table {path}: gkd-lab table {path.stem} --format parquet -o {path}")
    try:
        frame = pd.read_parquet(path)
    except ValueError as error:  # pyarrow's errors are ValueErrors
        raise ConfigError(f"{path} is not a parquet file, or cut short") from error
    if not {*LEADING_COLUMNS, *SCORE_COLUMNS} <= {*frame.columns}:
        columns = ", ".join(map(str, frame.columns[:5]))
        raise ConfigError(f"{path} is not a long table of gkd-lab: its first columns are {columns}")
    frame["stands_for"] = pd.Series(map(_parse_json, frame["stands_for"]), dtype="object")
    return frame


def list_committed_tables() -> dict[str, Path]:
    """Return name -> file of the tables in `analysis/tables`, first of this folder, then of the checkout."""
    files: dict[str, Path] = {}
    for root in (Path(), Path(__file__).parents[2]):
        for path in sorted((root / "analysis" / "tables").glob("*.parquet")):
            if not path.stem.endswith(".examples"):
                files.setdefault(path.stem, path)
    return files


def _refuse_setting(name: str, value: object, owner: str) -> None:
    """Raise ConfigError for a setting that the source of a table has itself."""
    if value is not None:
        raise ConfigError(f"{name} {str(value)!r}: {owner} has its own {name}; leave `{name}` out")


def _parse_json(text: Any) -> Any:
    """Return the value of a JSON text; None for a missing one."""
    return json.loads(text) if isinstance(text, str) else None
