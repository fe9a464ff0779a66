"""Rows of a task from one of three kinds of source: made on the spot, a local folder, a hub name.

Rows keep the order of their file. Where real data has no validation split, the last tenth of train
(at most 500 rows) is held out as validation and train ends before it, on every machine alike.
Whatever is left out is counted, with its reason.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from gkd_lab.config.errors import build_unknown_name_error, suggest_choices
from gkd_lab.tasks.data_folder import DataFolder
from gkd_lab.tasks.row_format import build_row_parser, check_row_format, prepend_shots
from gkd_lab.tasks.task import SPLITS, MadeSource, Row, Split, Task

SourceKind = Literal["made", "folder", "hub"]
HELD_OUT_DIVISOR = 10  # one in ten of train ...
MAX_HELD_OUT_ROWS = 500  # ... but no more than this

logger = logging.getLogger(__name__)


def count_held_out_rows(train_rows: int) -> int:
    """How many of train's last rows are validation where the data has none of its own."""
    return min(MAX_HELD_OUT_ROWS, max(1, train_rows // HELD_OUT_DIVISOR)) if train_rows > 1 else 0


class RowList(list[Row]):
    """Rows of a split, with how many rows before the last one were left out, by reason."""

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
    cache: Path | None = None,
) -> RowList:
    """The first `count` rows of a split; all there are if fewer, or if `count` is None.

    made: generator `name` ("made" by default), `seed`; an endless one needs `count`.
    folder: `path` with train, validation and test files, or its subfolder `config`.
    hub: `name`, `config`, `revision` through `datasets`, whose code is never trusted; rows with an
    empty field are left out, counted and warned of (XSum has some), while in a folder they are an error.
    `shots` worked examples stand before each question; `calculator_marks` keeps GSM8K's `<<48/2=24>>`.
    `cache` is a folder where a slow source may keep what it read.
    Raises ValueError, with the way out, for anything wrong in the request or the data.
    """
    _check_request(split, kind, count)
    check_row_format(task, kind, shots=shots, calculator_marks=calculator_marks)
    parse, dropped = build_row_parser(task, calculator_marks), Counter[str]()
    if kind == "made":
        found = _generate_rows(_get_generator(task, name or "made"), split, count, seed, cache)
    elif kind == "folder":
        found = _read_folder_rows(parse, _open_folder(path, config), split)
    else:
        found = _read_hub_rows(parse, name or _raise_missing_name(task), config, revision, split, dropped)
    shown = prepend_shots(task, found, shots=shots, calculator_marks=calculator_marks)
    rows = RowList(islice(shown, count), dropped)
    for reason, number in dropped.items():
        logger.warning("%s, %s: left out %d rows with %s", name, split, number, reason)
    return rows


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
    """What identifies a source's content, whatever its place: equal rows if it is equal.

    made: the generator's version; folder: SHA-256 of its data files; hub: the commit given.
    """
    if kind == "made":
        return _get_generator(task, name or "made").version(cache)
    if kind == "folder":
        return f"sha256:{_open_folder(path, config).compute_digest(cache)}"
    if not revision:
        raise ValueError(f"data of the hub ({name}) needs a revision: a commit, not a branch")
    return revision


def _check_request(split: str, kind: str, count: int | None) -> None:
    for value, valid, what in ((split, SPLITS, "split"), (kind, get_args(SourceKind), "kind of data")):
        if value not in valid:
            raise build_unknown_name_error(what, value, valid)
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")


def _get_generator(task: Task, name: str) -> MadeSource:
    if name not in task.generators:
        raise ValueError(f"{task.name} has no made source {name!r}; {suggest_choices(name, task.generators)}")
    return task.generators[name]


def _generate_rows(
    source: MadeSource, split: Split, count: int | None, seed: int, cache: Path | None
) -> Iterator[Row]:
    if count is None and source.endless:
        raise ValueError("this made source is endless: say how many rows (count)")
    source.check()
    return source.rows(seed, split, cache)


def _open_folder(path: str | Path | None, config: str | None) -> DataFolder:
    if path is None:
        raise ValueError("data in a folder needs a path")
    return DataFolder(Path(path) / config if config else Path(path))


RowParser = Callable[[Mapping[str, Any]], Row]


def _read_folder_rows(parse_row: RowParser, folder: DataFolder, split: Split) -> Iterator[Row]:
    source, start, stop = _locate_split(folder.row_counts, split, str(folder.path))
    for where, raw in islice(folder.read_rows(source), start, stop):
        try:
            yield parse_row(raw)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _locate_split(
    counts: Mapping[Split, int], split: Split, source_name: str
) -> tuple[Split, int, int | None]:
    """Where a split's rows are: (split to read, first row, end); the rule for held-out rows."""
    held = count_held_out_rows(counts.get("train", 0)) if "validation" not in counts else 0
    if split in counts and not (split == "train" and held):
        return split, 0, None
    if split == "test" or not held:
        raise ValueError(f"{source_name} has no split {split!r}; it has: {', '.join(counts)}")
    kept = counts["train"] - held
    logger.info("%s has no validation: the last %d of %d train rows", source_name, held, counts["train"])
    return ("train", 0, kept) if split == "train" else ("train", kept, None)


def _raise_missing_name(task: Task) -> NoReturn:
    raise ValueError("data of the hub needs a name" + (f", such as {task.hub_name}" if task.hub_name else ""))


def _read_hub_rows(
    parse_row: RowParser,
    name: str,
    config: str | None,
    revision: str | None,
    split: Split,
    dropped_counts: Counter[str],
) -> Iterator[Row]:
    import datasets  # slow, and only here

    try:
        loaded = datasets.load_dataset(name, config, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {name!r} ({config=}, {revision=}): {error}") from error
    counts = {one: len(loaded[one]) for one in SPLITS if one in loaded}
    source, start, stop = _locate_split(counts, split, name)
    for index in range(start, counts[source] if stop is None else stop):
        raw = loaded[source][index]
        if _has_empty_field(raw):
            dropped_counts["an empty field"] += 1
            continue
        try:
            yield parse_row(raw)
        except ValueError as error:
            raise ValueError(f"{name}, {source} row {index}: {error}") from error


def _has_empty_field(raw: Mapping[str, Any]) -> bool:
    pair = raw.get("translation")
    texts = (pair if isinstance(pair, Mapping) else raw).values()
    return any(isinstance(text, str) and not text.strip() for text in texts)
