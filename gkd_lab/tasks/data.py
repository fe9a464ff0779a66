"""Load rows of a task from a row generator (`made`), a local folder or the hub.

Rows keep the order of their file. Where real data has no validation split, the last tenth of train
(at most 500 rows) is held out as validation. Dropped rows are counted by reason.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from gkd_lab.config.artifact_specs import ColumnNames
from gkd_lab.config.errors import ConfigError, build_unknown_name_error, suggest_choices
from gkd_lab.config.library_errors import explain_data_error
from gkd_lab.tasks.columns import build_column_reader, list_text_columns
from gkd_lab.tasks.data_folder import DataFolder
from gkd_lab.tasks.row_format import build_row_parser, check_row_format, prepend_shots
from gkd_lab.tasks.task import SPLITS, Row, RowGenerator, Split, Task

SourceKind = Literal["made", "folder", "hub"]
RowParser = Callable[[Mapping[str, Any]], Row]
HELD_OUT_DIVISOR = 10
MAX_HELD_OUT_ROWS = 500

logger = logging.getLogger(__name__)


def count_held_out_rows(train_rows: int) -> int:
    """Return how many last train rows become validation: a tenth, at least 1, at most 500; 0 of 1 row."""
    return min(MAX_HELD_OUT_ROWS, max(1, train_rows // HELD_OUT_DIVISOR)) if train_rows > 1 else 0


class RowList(list[Row]):
    """Rows of a split, with the number of dropped rows before the last one by reason."""

    def __init__(self, rows: Iterable[Row] = (), dropped_counts: Mapping[str, int] | None = None) -> None:
        super().__init__(rows)
        self.dropped_counts: dict[str, int] = dict(dropped_counts or {})


def load_rows(
    task: Task,
    kind: SourceKind,
    *,
    name: str | None = None,
    path: str | Path | None = None,
    revision: str | None = None,
    config: str | None = None,
    split: Split,
    count: int | None = None,
    seed: int = 0,
    shots: int = 0,
    calculator_marks: bool = False,
    columns: ColumnNames | None = None,
    cache: Path | None = None,
) -> RowList:
    """Return the first `count` rows of a split; all rows if there are fewer, or if `count` is None.

    made: generator `name` ("made" by default) with `seed`; an endless generator needs `count`.
    folder: `path` with train, validation and test files, or its subfolder `config`.
    hub: `name`, `config` and `revision` of `datasets`, whose code is never trusted; rows with an empty
    field are dropped, counted and logged as a warning (XSum has some), while in a folder they are an error.
    `shots` worked examples precede each question; `calculator_marks` keeps GSM8K's `<<48/2=24>>`.
    `columns` names the columns of real rows that have other names than the task's.
    `cache` is a folder where a slow source may store what it read.
    Raises ValueError, with what to do, for an invalid request or invalid data.
    """
    _check_request(split, kind, count)
    check_row_format(task, kind, shots=shots, calculator_marks=calculator_marks)
    parse_row, dropped_counts = build_row_parser(task, calculator_marks, columns), Counter[str]()
    if kind == "made":
        rows = _generate_rows(_get_generator(task, name or "made"), split, count, seed, cache)
    elif kind == "folder":
        rows = _read_folder_rows(parse_row, _open_folder(path, config), split)
    else:
        if name is None:
            hint = f", such as {task.hub_name}" if task.hub_name else ""
            raise ValueError(f"data of the hub needs a name{hint}")
        has_empty_field = _build_empty_field_check(task, columns)
        rows = _read_hub_rows(parse_row, has_empty_field, name, config, revision, split, dropped_counts)
    prompted_rows = prepend_shots(task, rows, shots=shots, calculator_marks=calculator_marks)
    loaded = RowList(islice(prompted_rows, count), dropped_counts)
    for reason, number in dropped_counts.items():
        logger.warning("%s, %s: left out %d rows with %s", name, split, number, reason)
    return loaded


def get_source_revision(
    task: Task,
    kind: SourceKind,
    *,
    name: str | None = None,
    path: str | Path | None = None,
    revision: str | None = None,
    config: str | None = None,
    cache: Path | None = None,
) -> str:
    """Return a data source's content version: equal revisions give equal rows, wherever they are stored.

    made: the generator's version; folder: SHA-256 of its data files; hub: the commit given.
    """
    if kind == "made":
        return _get_generator(task, name or "made").get_version(cache)
    if kind == "folder":
        return f"sha256:{_open_folder(path, config).compute_digest(cache)}"
    if not revision:
        raise ValueError(f"data of the hub ({name}) needs a revision: a commit, not a branch")
    return revision


def check_first_rows(
    task: Task,
    *,
    path: str | Path,
    config: str | None = None,
    calculator_marks: bool = False,
    columns: ColumnNames | None = None,
) -> None:
    """Raise ValueError with each split of a data folder whose first row is not one of the task.

    Reads one row of each split, and none of the others.
    """
    folder, parse_row = _open_folder(path, config), build_row_parser(task, calculator_marks, columns)
    locations: dict[str, list[str]] = {}
    """Fault -> the rows that have it."""
    for split in folder.files:
        for location, fault in _find_first_row_fault(folder, split, parse_row):
            locations.setdefault(fault, []).append(location)
    if locations:
        raise ValueError("; ".join(f"{', '.join(rows)}: {fault}" for fault, rows in locations.items()))


def _find_first_row_fault(
    folder: DataFolder, split: Split, parse_row: RowParser
) -> Iterator[tuple[str, str]]:
    """Yield (`FILE:LINE`, what is wrong) of the first row of a split, if something is."""
    try:
        location, raw = next(folder.read_rows(split), ("", None))
    except ValueError as error:
        location, _, fault = str(error).partition(": ")
        yield location, fault
        return
    if raw is None:
        yield str(folder.files[split][0]), "the file is empty, expected at least one row"
        return
    try:
        parse_row(raw)
    except ValueError as error:
        yield location, str(error)


def is_data_folder(path: Path, config: str | None) -> bool:
    """Return whether a folder, or its subfolder `config`, has files of rows whose splits are clear."""
    try:
        return bool(_open_folder(path, config).files)
    except ValueError:
        return False


def count_few_train_rows(path: str | Path, config: str | None, enough: int) -> int | None:
    """Return the number of train rows of a folder if it is below `enough`; None if it is not, or unknown.

    Without a validation split the rows that are held out of train do not count. Few rows are read.
    """
    folder = _open_folder(path, config)
    if "train" not in folder.files:
        return None
    try:
        rows = sum(1 for _ in islice(folder.read_rows("train"), 2 * enough + 2))
    except ValueError:
        return None  # a damaged row, which is named when it is read
    if "validation" not in folder.files:
        rows -= count_held_out_rows(rows)
    return rows if rows < enough else None


def list_missing_splits(path: str | Path, config: str | None, splits: Iterable[Split]) -> list[str]:
    """Return a sentence for each of these splits that a data folder neither has nor can hold out of train."""
    folder = _open_folder(path, config)
    available = set(folder.files)
    if "train" in available and _has_several_rows(folder, "train"):
        available.add("validation")
    return [
        f"{folder.path} has no split {split!r}; it has: {', '.join(folder.files)}"
        for split in splits
        if split not in available
    ]


def _has_several_rows(folder: DataFolder, split: Split) -> bool:
    """Return whether a split has two rows or more, or a damaged one, which is named when it is read."""
    try:
        return len(list(islice(folder.read_rows(split), 2))) == 2
    except ValueError:
        return True


def _check_request(split: str, kind: str, count: int | None) -> None:
    """Raise ValueError for an unknown split, an unknown kind of data, or a count below 1."""
    for value, valid, noun in ((split, SPLITS, "split"), (kind, get_args(SourceKind), "kind of data")):
        if value not in valid:
            raise build_unknown_name_error(noun, value, valid)
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")


def _get_generator(task: Task, name: str) -> RowGenerator:
    """Return the task's row generator of this name; ValueError with the nearest names if there is none."""
    if name not in task.generators:
        raise ValueError(f"{task.name} has no made source {name!r}; {suggest_choices(name, task.generators)}")
    return task.generators[name]


def _generate_rows(
    generator: RowGenerator, split: Split, count: int | None, seed: int, cache: Path | None
) -> Iterator[Row]:
    """Return the generator's rows of a split; ValueError: endless without `count`, or missing package."""
    if count is None and generator.is_endless:
        raise ValueError("this made source is endless: say how many rows (count)")
    generator.check_dependencies()
    return generator.generate_rows(seed, split, cache)


def _open_folder(path: str | Path | None, config: str | None) -> DataFolder:
    """Return the DataFolder at `path`, or at its subfolder `config`; ValueError without a path."""
    if path is None:
        raise ValueError("data in a folder needs a path")
    return DataFolder(Path(path) / config if config else Path(path))


def _read_folder_rows(parse_row: RowParser, folder: DataFolder, split: Split) -> Iterator[Row]:
    """Yield the parsed rows of a split of a data folder; a ValueError names file and line."""
    stored_split, start, stop = _locate_split(folder.row_counts, split, str(folder.path))
    for location, raw in islice(folder.read_rows(stored_split), start, stop):
        try:
            yield parse_row(raw)
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from error


def _locate_split(
    row_counts: Mapping[Split, int], split: Split, source_name: str
) -> tuple[Split, int, int | None]:
    """Return (stored split, first row, end row or None) of `split`; ValueError if there is none.

    Without a stored validation split, the last rows of train are validation and train ends before them.
    """
    held_out = count_held_out_rows(row_counts.get("train", 0)) if "validation" not in row_counts else 0
    if split in row_counts and not (split == "train" and held_out):
        return split, 0, None
    if split == "test" or not held_out:
        raise ValueError(f"{source_name} has no split {split!r}; it has: {', '.join(row_counts)}")
    train_rows = row_counts["train"] - held_out
    logger.info(
        "%s has no validation: the last %d of %d train rows", source_name, held_out, row_counts["train"]
    )
    return ("train", 0, train_rows) if split == "train" else ("train", train_rows, None)


def _read_hub_rows(
    parse_row: RowParser,
    has_empty_field: Callable[[Mapping[str, Any]], bool],
    name: str,
    config: str | None,
    revision: str | None,
    split: Split,
    dropped_counts: Counter[str],
) -> Iterator[Row]:
    """Yield a hub data set's parsed rows; rows with an empty field are left out and counted."""
    import datasets  # takes seconds to load

    try:
        dataset = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:
        # The library raises errors of its own, of the hub's client and of its readers of files.
        raise ConfigError(explain_data_error(error, name, config, "data.source")) from error
    row_counts = {stored: len(dataset[stored]) for stored in SPLITS if stored in dataset}
    stored_split, start, stop = _locate_split(row_counts, split, name)
    for index in range(start, row_counts[stored_split] if stop is None else stop):
        raw = dataset[stored_split][index]
        if has_empty_field(raw):
            dropped_counts["an empty field"] += 1
            continue
        try:
            yield parse_row(raw)
        except ValueError as error:
            raise ValueError(f"{name}, {stored_split} row {index}: {error}") from error


def _build_empty_field_check(task: Task, columns: ColumnNames | None) -> Callable[[Mapping[str, Any]], bool]:
    """Return the function raw row -> whether a text of it is blank: of its prompt and target, or any."""
    names, rename_columns = list_text_columns(task, columns), build_column_reader(task, columns)

    def has_empty_field(raw: Mapping[str, Any]) -> bool:
        """Return whether a text field of a raw row (or of its `translation`) is blank."""
        if names is not None:
            renamed = rename_columns(raw)
            texts: Iterable[Any] = [renamed.get(name) for name in names]
        else:
            pair = raw.get("translation")
            texts = (pair if isinstance(pair, Mapping) else raw).values()
        return any(isinstance(text, str) and not text.strip() for text in texts)

    return has_empty_field
