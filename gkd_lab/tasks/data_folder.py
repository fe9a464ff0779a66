"""Data files of a local folder: their splits, their rows and the digest of their content.

Files are `train`, `validation` or `test` with `.jsonl` or `.parquet`, one file or all shards
(`train-00000-of-00002.parquet`), in the folder or in its `data/`. Other words for a split are those of
`datasets`. Other data files are left alone, with a warning that names them.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from gkd_lab.config.content_hashes import hash_files
from gkd_lab.config.errors import suggest_sibling
from gkd_lab.tasks.task import SPLITS, Split

_SPLIT_WORDS: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Word in a file's name -> split, as `datasets.load_dataset(folder)` reads them."""
_DATA_FILE = re.compile(rf"({'|'.join(_SPLIT_WORDS)})(?:-(\d+)-of-(\d+)(?:-[0-9a-f]+)?)?\.(jsonl|parquet)")
"""Name of a data file. The hub's shards end in hexadecimal digits, each shard in its own."""
_TABLE_SUFFIXES = {".jsonl", ".parquet", ".json", ".csv", ".tsv", ".arrow", ".gz", ".zst"}
"""Endings of files that probably hold rows."""
_ROWS_PER_READ = 1_000

logger = logging.getLogger(__name__)


class DataFolder:
    """Data files of one folder. ValueError for a missing, empty or ambiguous folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[Split, list[Path]] = _list_split_files(_require_folder(path))
        _warn_of_unread_files(path.resolve(), tuple(self.list_unread_files()))

    @cached_property
    def row_counts(self) -> dict[Split, int]:
        """Split -> number of its rows, for the splits that the folder has."""
        return {split: sum(map(_count_rows, files)) for split, files in self.files.items()}

    def list_unread_files(self) -> list[str]:
        """Return the sorted relative names of files that probably hold rows and belong to no split."""
        split_files = {file for files in self.files.values() for file in files}
        return [
            file.relative_to(self.path).as_posix()
            for file in _list_files(self.path)
            if file not in split_files and file.suffix in _TABLE_SUFFIXES
        ]

    def read_rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield (`FILE:LINE`, raw row) for each row of a split, in file order."""
        for file in self.files[split]:
            yield from read_file_rows(file)

    def compute_digest(self, cache: Path | None = None) -> str:
        """Return the SHA-256 over the sorted relative names and the bytes of all data files.

        The folder `cache` stores the digest of each file by path, size and modification time.
        """
        digests = _read_digest_cache(cache)
        total = hashlib.sha256()
        files = sorted(file for files in self.files.values() for file in files)
        for file, sha256 in hash_files(self.path, files, digests).items():
            total.update(f"{file.relative_to(self.path).as_posix()}\0{sha256}\n".encode())
        _write_digest_cache(cache, digests)
        return total.hexdigest()


def _require_folder(path: Path) -> Path:
    """Return `path` unchanged if it is a folder; ValueError with the nearest name otherwise."""
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; give the folder that holds it")
    nearest = suggest_sibling(path)
    hint = f" Did you mean {nearest}?" if nearest else ""
    raise ValueError(f"no folder {path}.{hint}")


def _list_files(path: Path) -> list[Path]:
    """Return the sorted files in a folder and in its subfolder `data`."""
    return sorted(file for file in (*path.glob("*"), *path.glob("data/*")) if file.is_file())


@cache
def _warn_of_unread_files(path: Path, names: tuple[str, ...]) -> None:
    """Log a warning that names the data files of a folder that are left alone; once for each list."""
    if names:
        logger.warning(
            "%s: left alone: %s; a split is %s, as .jsonl or .parquet",
            path,
            ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else ""),
            ", ".join(_SPLIT_WORDS),
        )


def _list_split_files(path: Path) -> dict[Split, list[Path]]:
    """Return split -> its sorted data files, for the splits that the folder has; ValueError for none."""
    matches = [(file, match) for file in _list_files(path) if (match := _DATA_FILE.fullmatch(file.name))]
    files: dict[Split, list[Path]] = {}
    for split in SPLITS:
        split_files = [(file, match) for file, match in matches if _SPLIT_WORDS[match[1]] == split]
        if split_files:
            _check_shards(split_files)
            files[split] = [file for file, _ in split_files]
    if not files:
        raise ValueError(
            f"{path} holds no file of rows: a split is {', '.join(_SPLIT_WORDS)}, as .jsonl or .parquet; "
            "it holds: " + (", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing")
        )
    return files


def _check_shards(split_files: list[tuple[Path, re.Match[str]]]) -> None:
    """Raise ValueError unless a split's files are one file or one complete set of shards."""
    names = [str(file) for file, _ in split_files]
    layouts = {(file.parent, match[1], match[3], match[4]) for file, match in split_files}
    numbers = [int(match[2]) for _, match in split_files if match[2]]
    if len(layouts) > 1 or len(set(numbers)) < len(numbers):
        raise ValueError(f"more than one form of the same split, keep one: {', '.join(names)}")
    total = layouts.pop()[2]
    if total and numbers != list(range(int(total))):
        missing = sorted(set(range(int(total))) - set(numbers))
        raise ValueError(f"{names[0]}: of {int(total)} shards these are missing: {missing}")


def _count_rows(file: Path) -> int:
    """Return the number of rows of a file; ValueError if there are none."""
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            rows = sum(1 for line in lines if line.strip())
    else:
        rows = int(_open_parquet(file).metadata.num_rows)
    if not rows:
        raise ValueError(f"{file}: the file is empty, expected at least one row")
    return rows


def read_file_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (`FILE:LINE`, raw row) of a .jsonl or .parquet file; ValueError where it is damaged."""
    yield from (_read_jsonl_rows(file) if file.suffix == ".jsonl" else _read_parquet_rows(file))


def _read_jsonl_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (`FILE:LINE`, row) of a JSON lines file, blank lines skipped; ValueError at a damaged line."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            location = f"{file}:{number}"
            try:
                raw = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                byte = line[error.start : error.start + 1]
                raise ValueError(f"{location}: expected UTF-8, byte {error.start} is {byte!r}") from error
            except json.JSONDecodeError as error:
                excerpt = line[:60].decode("utf-8", "replace").strip()
                reason = error.msg.lower().removesuffix(" at")
                raise ValueError(
                    f"{location}: expected a JSON object, {reason} at column {error.colno}: {excerpt}"
                ) from error
            if not isinstance(raw, dict):
                raise ValueError(f"{location}: expected a JSON object, got {str(raw)[:60]!r}")
            yield location, raw


def _read_parquet_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (`FILE:ROW`, row) of a parquet file, rows numbered from 1."""
    number, batches = 0, _open_parquet(file).iter_batches(_ROWS_PER_READ)
    while (batch := _read_next_batch(batches, file, number)) is not None:
        for raw in batch.to_pylist():
            number += 1
            yield f"{file}:{number}", raw


def _read_next_batch(batches: Iterator[Any], file: Path, number: int) -> Any:
    """Return the next batch of a parquet file after `number` rows, None at its end; ValueError if damaged."""
    import pyarrow

    try:
        return next(batches, None)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the machine
        raise ValueError(f"{file}: the file is damaged after row {number}; copy it again") from error


def _open_parquet(file: Path) -> Any:
    """Return the opened parquet file; ValueError if it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: expected a parquet file, and it is none, or cut short") from error


def _read_digest_cache(cache: Path | None) -> dict[str, str]:
    """Return the cached digests, path|size|time -> SHA-256; {} without a cache folder or file."""
    path = cache / "digests.json" if cache else None
    return dict(json.loads(path.read_text())) if path and path.exists() else {}


def _write_digest_cache(cache: Path | None, digests: dict[str, str]) -> None:
    """Write the digests to the cache folder, by rename; do nothing without a cache folder."""
    if cache is None:
        return
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = cache / f"digests.{os.getpid()}"
    unfinished.write_text(json.dumps(digests, indent=0))
    unfinished.replace(cache / "digests.json")
