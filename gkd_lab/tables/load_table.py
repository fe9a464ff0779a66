"""Load the long results table of an experiment from its records, or from a parquet file."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from gkd_lab import experiments
from gkd_lab.config import ConfigError, Grid
from gkd_lab.config.experiment import Scale
from gkd_lab.store import Store
from gkd_lab.tables.long_table import LEADING_COLUMNS, SCORE_COLUMNS, build_long_table


def load_table(
    experiment_or_path: str | Path | Grid, scale: Scale | None = None, outputs: str | Path = "outputs"
) -> pd.DataFrame:
    """Return the long table of an experiment, as `build_long_table` describes it.

    Args:
        experiment_or_path: An experiment's name, its YAML file or its grid, whose records are read; or a
            parquet file that `gkd-lab table` wrote.
        scale: Scale of the experiment; default: that of its file.
        outputs: Folder of the records.

    Raises:
        ConfigError: for an unknown experiment, a file that is missing or holds no table, or a `scale` where
            the grid or the file has its own.
    """
    if isinstance(experiment_or_path, Grid):
        _refuse_scale(scale, "the grid")
        return build_long_table(experiment_or_path, Store(Path(outputs)))
    if str(experiment_or_path).endswith(".parquet"):
        _refuse_scale(scale, str(experiment_or_path))
        return read_table_file(Path(experiment_or_path))
    grid = experiments.load(str(experiment_or_path), scale=scale, outputs=outputs)
    return build_long_table(grid, Store(Path(outputs)))


def read_table_file(path: Path) -> pd.DataFrame:
    """Return the long table of a parquet file. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"no table {path}: gkd-lab table {path.stem} --format parquet -o {path}")
    try:
        frame = pd.read_parquet(path)
    except ValueError as error:  # pyarrow's errors are ValueErrors
        raise ConfigError(f"{path} is not a parquet file: {error}") from error
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


def _refuse_scale(scale: Scale | None, owner: str) -> None:
    """Raise ConfigError for a scale where grid or file has its own."""
    if scale is not None:
        raise ConfigError(f"scale {scale!r}: {owner} has its own scale; leave `scale` out")


def _parse_json(text: Any) -> Any:
    """Return the value of a JSON text; None for a missing one."""
    return json.loads(text) if isinstance(text, str) else None
