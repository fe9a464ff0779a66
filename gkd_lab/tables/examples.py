"""Per-example scores of the models of a table, from their stored predictions; and their parquet file.

The file `NAME.examples.parquet` stands beside the table `NAME.parquet`; claims read it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gkd_lab.config import ConfigError, Grid
from gkd_lab.store import Store
from gkd_lab.store.files import write_bytes
from gkd_lab.tables.example_statistics import (
    SCORE_TOLERANCE,
    Array,
    ExampleStatistics,
    build_example_statistics,
    compute_pseudo_values,
)
from gkd_lab.tables.results import TableModel, list_models, name_evaluations
from gkd_lab.tables.rows import list_requested_metrics

EXAMPLE_COLUMNS = ("cell", "evaluation", "metric", "example", "value", "statistics")
_KEYS = ("cell", "evaluation", "metric")
_PARQUET_OPTIONS: dict[str, Any] = {"compression": "zstd", "compression_level": 19}
"""Files are a third smaller than with pandas' default, snappy."""


class _ExampleBlock(NamedTuple):
    """Examples of one model, evaluation and metric."""

    cell: str
    evaluation: str
    metric: str
    statistics: ExampleStatistics


def build_examples(grid: Grid, store: Store) -> pd.DataFrame:
    """Build the per-example scores of all models of a grid, reference models too.

    A row is a model (`cell`), `evaluation`, requested `metric` and `example`, the number of a prompt in the
    evaluation's rows from 0; several samples of a prompt are one example. `value` is in points, and its mean
    over examples is the stored score: the example's own score (of samples, their mean), or for a corpus score
    such as BLEU its infinitesimal-jackknife value, see `compute_pseudo_values`. `statistics` holds the
    sufficient statistics of a corpus score (of samples, their sum), None otherwise.

    A score without stored predictions, or that they do not give any more, has no rows.
    """
    blocks: dict[tuple[str, str, str], _ExampleBlock] = {}
    for model in list_models(grid, store):
        for block in _list_blocks(model):
            blocks.setdefault(block[:3], block)
    return _join_blocks(list(blocks.values()))


def _list_blocks(model: TableModel) -> Iterator[_ExampleBlock]:
    """Yield the examples of each requested score of a model that its stored predictions give."""
    names = name_evaluations(model.evaluations)
    for evaluation in model.evaluations:
        part = model.record.get_evaluation(evaluation)
        if part.read_state() != "done":
            continue
        scores, rows = part.read_scores(), part.read_prediction_rows()
        for metric in list_requested_metrics(evaluation, is_first=evaluation is model.evaluations[0]):
            stored = scores.get(metric, {}).get("value")
            values = [row.get("scores", {}).get(metric) for row in rows]
            if stored is None or not rows or not all(isinstance(value, int | float) for value in values):
                continue
            statistics = build_example_statistics(metric, rows, values)
            if abs(statistics.score - stored) <= SCORE_TOLERANCE:
                yield _ExampleBlock(model.fingerprint, names[evaluation.folder], metric, statistics)


def _join_blocks(blocks: Sequence[_ExampleBlock]) -> pd.DataFrame:
    """Return the frame of all examples."""
    counts = np.array([len(block.statistics) for block in blocks], dtype="int64")
    rows: list[Array | None] = []
    for block in blocks:
        is_corpus_score = block.statistics.corpus_score is not None
        rows += list(block.statistics.statistics) if is_corpus_score else [None] * len(block.statistics)
    values = [compute_pseudo_values(block.statistics) for block in blocks]
    return pd.DataFrame(
        {
            **{name: np.repeat([getattr(block, name) for block in blocks], counts) for name in _KEYS},
            "example": np.concatenate([np.empty(0, "int32"), *(np.arange(n, dtype="int32") for n in counts)]),
            "value": np.concatenate([np.empty(0), *values]),
            "statistics": pd.Series(rows, dtype="object"),
        }
    ).astype(dict.fromkeys(_KEYS, "str"))


# ---- file ----


def get_examples_path(table: Path) -> Path:
    """Return the path of the examples beside a table: `NAME.examples.parquet` for `NAME.parquet`."""
    return table.with_suffix(".examples.parquet")


def write_examples(frame: pd.DataFrame, path: Path) -> None:
    """Write examples as a parquet file; values are float32."""
    small = frame.astype({"value": "float32"})
    write_bytes(path, small.to_parquet(index=False, **_PARQUET_OPTIONS))


def read_examples(path: str | Path) -> pd.DataFrame:
    """Return the examples of a parquet file, as `build_examples` builds them.

    Raises ConfigError for a file that is missing or holds something else.
    """
    if not Path(path).is_file():
        raise ConfigError(
            f"no examples {path}: gkd-lab table EXP --format parquet --examples -o NAME.parquet"
        )
    try:
        frame = pd.read_parquet(path)
    except ValueError as error:  # pyarrow's errors are ValueErrors
        raise ConfigError(f"{path} is not a parquet file, or cut short") from error
    if list(frame.columns) != list(EXAMPLE_COLUMNS):
        columns = ", ".join(map(str, frame.columns[:6]))
        raise ConfigError(f"{path} holds no examples: its columns are {columns}")
    return frame.astype({"value": "float64"})
