"""Preview a user's data: its splits, columns and first rows. No other row is read, and no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gkd_lab.config import ConfigError
from gkd_lab.config.errors import suggest_sibling
from gkd_lab.revisions import is_hub_name
from gkd_lab.tasks import SPLITS, Split
from gkd_lab.tasks.columns import RawRow
from gkd_lab.tasks.data import count_held_out_rows
from gkd_lab.tasks.data_folder import DataFolder

ROWS_READ = 200
"""First rows that are read of each split."""


@dataclass(frozen=True)
class DataPreview:
    """Splits, row counts and first rows of a data folder or of a data set of the hub."""

    source: str
    config: str | None
    row_counts: Mapping[Split, int | None]
    """Split -> number of rows; None: not known before all is read."""
    rows: Sequence[RawRow]
    """First rows of all splits, those of train first."""

    def describe_splits(self) -> str:
        """Return `train 7,473 rows, test 1,319 rows`."""
        counts = {split: self.row_counts[split] for split in SPLITS if split in self.row_counts}
        return ", ".join(
            split if count is None else f"{split} {count:,} row{'' if count == 1 else 's'}"
            for split, count in counts.items()
        )

    def count_train_rows(self) -> int | None:
        """Return the number of rows to train on, without those held out for validation; None: not known."""
        rows = self.row_counts.get("train")
        if rows is None or "validation" in self.row_counts:
            return rows
        return rows - count_held_out_rows(rows)


def preview_data(source: str, config: str | None = None) -> DataPreview:
    """Return the preview of a folder, or of a hub name `owner/name`. Raises ConfigError."""
    path = Path(source).expanduser()
    try:
        if path.is_dir() or path.is_file():
            preview = _preview_folder(source, path / config if config else path, config)
        elif is_hub_name(source):
            preview = _preview_hub(source, config)
        else:
            nearest = suggest_sibling(source, _holds_rows)
            hint = f"; did you mean {nearest}?" if nearest else ""
            raise ConfigError(f"--data: no folder {source!r}, nor a hub name (owner/name){hint}")
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"--data: {error}") from error
    if "train" not in preview.row_counts:
        splits = ", ".join(preview.row_counts)
        raise ConfigError(f"--data: {source} has no split 'train' to distil on; it has: {splits}")
    return preview


def _holds_rows(path: Path) -> bool:
    """Return whether a path is a folder with files of rows."""
    return any(next(path.glob(pattern), None) for pattern in ("*.jsonl", "*.parquet", "data/*.parquet"))


def _preview_folder(source: str, path: Path, config: str | None) -> DataPreview:
    """Return the preview of a folder of jsonl or parquet files. Raises ValueError."""
    folder = DataFolder(path)
    rows: list[RawRow] = []
    for split in folder.files:
        rows += [raw for _, raw in islice(folder.read_rows(split), ROWS_READ)]
    return DataPreview(source, config, dict(folder.row_counts), rows)


def _preview_hub(source: str, config: str | None) -> DataPreview:
    """Return the preview of a data set of the hub, without downloading all of it. Raises ConfigError."""
    import datasets  # takes seconds to load

    try:
        dataset: Mapping[str, Any] = datasets.load_dataset(source, config, streaming=True)
        rows: list[RawRow] = []
        counts: dict[Split, int | None] = {}
        for split in SPLITS:
            if split in dataset:
                rows += islice(dataset[split], ROWS_READ)
                split_info = (dataset[split].info.splits or {}).get(split)
                counts[split] = None if split_info is None else split_info.num_examples
    except Exception as error:
        # The library raises errors of several HTTP clients; each means that the rows cannot be seen.
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--data: cannot look at {source!r} on the hub ({type(error).__name__}: {reason}); download it "
            "into a folder of jsonl or parquet files, and give that"
        ) from error
    return DataPreview(source, config, counts, rows)
