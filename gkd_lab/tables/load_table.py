"""Load the long results table of an experiment from its records, or from a parquet file."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from gkd_lab import experiments
from gkd_lab.config import ConfigError, Grid
from gkd_lab.config.experiment import Scale
from gkd_lab.store import Store
from gkd_lab.tables.legacy_table import convert_wide_table
from gkd_lab.tables.long_table import LEADING_COLUMNS, SCORE_COLUMNS, build_long_table

_NESTED_COLUMNS = ("evaluations", "stands_for")


def load_table(
    experiment_or_path: str | Path | Grid, scale: Scale | None = None, outputs: str | Path = "outputs"
) -> pd.DataFrame:
    """Return the long table of an experiment, as `build_long_table` describes it.

    Args:
        experiment_or_path: An experiment's name, its YAML file or its grid, whose records are read; or a
            parquet file that `gkd-lab table` wrote, also one in the wide form of older versions.
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
        return read_table_file(Path(experiment_or_path), outputs)
    grid = experiments.load(str(experiment_or_path), scale=scale, outputs=outputs)
    return build_long_table(grid, Store(Path(outputs)))


def read_table_file(path: Path, outputs: str | Path = "outputs") -> pd.DataFrame:
    """Return the long table of a parquet file; a wide one is converted. Raises ConfigError.

    `outputs` holds the commits of hub models and data that the experiment of a wide table names.
    """
    if not path.is_file():
        raise ConfigError(f"no table {path}: gkd-lab table {path.stem} --format parquet -o {path}")
    try:
        frame = pd.read_parquet(path)
    except ValueError as error:  # pyarrow's errors are ValueErrors
        raise ConfigError(f"{path} is not a parquet file: {error}") from error
    for name in _NESTED_COLUMNS:
        if name in frame:
            frame[name] = pd.Series(map(_parse_json, frame[name]), dtype="object")
    if {*LEADING_COLUMNS, *SCORE_COLUMNS} <= {*frame.columns}:
        return frame
    if not {"cell", "role", "task", "status", "evaluations"} <= {*frame.columns}:
        columns = ", ".join(map(str, frame.columns[:5]))
        raise ConfigError(f"{path} is not a table of gkd-lab: its first columns are {columns}")
    return convert_wide_table(frame, _load_grid_of_table(frame, outputs))


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


def _load_grid_of_table(frame: pd.DataFrame, outputs: str | Path) -> Grid | None:
    """Return the grid of the experiment that a wide table names; None if there is no such experiment now."""
    try:
        return experiments.load(frame.attrs["experiment"], scale=frame.attrs["scale"], outputs=outputs)
    except (KeyError, ConfigError):
        return None
