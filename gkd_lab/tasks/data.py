"""Rows of a task from one of three kinds of source: made on the spot, a local folder, a hub name.

Rows keep the order of their file. Where real data has no validation split, the last tenth of train
(at most 500 rows) is held out as validation and train ends before it, on every machine alike.
"""

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from gkd_lab.spec.errors import nearest, unknown
from gkd_lab.tasks.folder import DataFolder
from gkd_lab.tasks.task import SPLITS, MadeSource, Row, Split, Task

Kind = Literal["made", "folder", "hub"]
HELD_OUT_SHARE = 10  # one in ten of train ...
MOST_HELD_OUT = 500  # ... but no more than this

logger = logging.getLogger(__name__)


def held_out(train_rows: int) -> int:
    """How many of train's last rows are validation where the data has none of its own."""
    return min(MOST_HELD_OUT, max(1, train_rows // HELD_OUT_SHARE)) if train_rows > 1 else 0


def load_rows(
    task: Task,
    kind: Kind,
    *,
    name: str | None = None,
    path: str | Path | None = None,
    revision: str | None = None,
    config: str | None = None,
    split: Split,
    count: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
) -> list[Row]:
    """The first `count` rows of a split; all there are if fewer, or if `count` is None.

    made: generator `name` ("made" by default), `seed`; an endless one needs `count`.
    folder: `path` with train, validation and test files, or its subfolder `config`.
    hub: `name`, `config`, `revision` through `datasets`, whose code is never trusted; rows with an
    empty field are left out with a warning (XSum has some), while in a folder they are an error.
    `cache` is a folder where a slow source may keep what it read.
    Raises ValueError, with the way out, for anything wrong in the request or the data.
    """
    _check(split, kind, count)
    if kind == "made":
        return _made_rows(_generator(task, name or "made"), split, count, seed, cache)
    if kind == "folder":
        return list(islice(_folder_rows(task, _folder(path, config), split), count))
    return list(islice(_hub_rows(task, name, config, revision, split), count))


def source_revision(
    task: Task,
    kind: Kind,
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
        return _generator(task, name or "made").version(cache)
    if kind == "folder":
        return f"sha256:{_folder(path, config).digest(cache)}"
    if not revision:
        raise ValueError(f"data of the hub ({name}) needs a revision: a commit, not a branch")
    return revision


def _check(split: str, kind: str, count: int | None) -> None:
    for value, valid, what in ((split, SPLITS, "split"), (kind, get_args(Kind), "kind of data")):
        if value not in valid:
            raise unknown(what, value, valid)
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")


def _generator(task: Task, name: str) -> MadeSource:
    if name not in task.generators:
        raise ValueError(f"{task.name} has no made source {name!r}; {nearest(name, task.generators)}")
    return task.generators[name]


def _made_rows(
    source: MadeSource, split: Split, count: int | None, seed: int, cache: Path | None
) -> list[Row]:
    if count is None and source.endless:
        raise ValueError("this made source is endless: say how many rows (count)")
    return list(islice(source.rows(seed, split, cache), count))


def _folder(path: str | Path | None, config: str | None) -> DataFolder:
    if path is None:
        raise ValueError("data in a folder needs a path")
    return DataFolder(Path(path) / config if config else Path(path))


def _folder_rows(task: Task, folder: DataFolder, split: Split) -> Iterator[Row]:
    source, start, stop = _place(folder.counts, split, str(folder.path))
    for where, raw in islice(folder.rows(source), start, stop):
        try:
            yield task.parse(raw)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _place(counts: Mapping[Split, int], split: Split, place: str) -> tuple[Split, int, int | None]:
    """Where a split's rows are: (split to read, first row, end); the rule for held-out rows."""
    held = held_out(counts.get("train", 0)) if "validation" not in counts else 0
    if split in counts and not (split == "train" and held):
        return split, 0, None
    if split == "test" or not held:
        raise ValueError(f"{place} has no split {split!r}; it has: {', '.join(counts)}")
    kept = counts["train"] - held
    logger.info("%s has no validation: the last %d of %d train rows", place, held, counts["train"])
    return ("train", 0, kept) if split == "train" else ("train", kept, None)


def _hub_rows(
    task: Task, name: str | None, config: str | None, revision: str | None, split: Split
) -> Iterator[Row]:
    import datasets  # slow, and only here

    if not name:
        raise ValueError("data of the hub needs a name, such as " + task.hub_name)
    try:
        loaded = datasets.load_dataset(name, config, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {name!r} ({config=}, {revision=}): {error}") from error
    counts = {one: len(loaded[one]) for one in SPLITS if one in loaded}
    source, start, stop = _place(counts, split, name)
    skipped = 0
    for index in range(start, counts[source] if stop is None else stop):
        raw = loaded[source][index]
        if _has_empty_field(raw):
            skipped += 1
            continue
        try:
            yield task.parse(raw)
        except ValueError as error:
            raise ValueError(f"{name}, {source} row {index}: {error}") from error
    if skipped:
        logger.warning("%s, %s: left out %d rows with an empty field", name, split, skipped)


def _has_empty_field(raw: Mapping[str, Any]) -> bool:
    pair = raw.get("translation")
    texts = (pair if isinstance(pair, Mapping) else raw).values()
    return any(isinstance(text, str) and not text.strip() for text in texts)
