"""Which record a user means: its folder, or the first digits of its fingerprint."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from gkd_lab.config.errors import SpecError
from gkd_lab.config.fingerprint import SHOWN
from gkd_lab.store.files import read_json
from gkd_lab.store.record import Record

_FOLDER = re.compile(rf".*-([0-9a-f]{{{SHOWN}}})")
_DIGITS = re.compile(r"[0-9a-f]{1,64}")
_MOST_NAMED = 10


def find_record(name: str, outputs: Path) -> Record:
    """The record of a cell, a teacher or a starting student that `name` stands for. Raises SpecError."""
    folder = Path(name)
    if name and folder.is_dir() and not _DIGITS.fullmatch(name):
        return _in_folder(folder)
    found = [record for digits, record in all_records(outputs) if _begins(record, digits, name)]
    if len(found) == 1:
        return found[0]
    raise _unknown(name, outputs) if not found else _ambiguous(name, found)


def all_records(outputs: Path) -> Iterator[tuple[str, Record]]:
    """(shown fingerprint, record) of everything that was begun below the outputs folder, by name."""
    for path in sorted(outputs.glob("*/*/*/spec.json")):
        match = _FOLDER.fullmatch(path.parent.name)
        if match:
            yield match[1], Record(path.parent)


def _in_folder(folder: Path) -> Record:
    if folder.resolve().parent.name == "evaluations":
        raise SpecError(f"{str(folder)!r} is an evaluation; its record is {str(folder.parent.parent)!r}")
    if not (folder / "spec.json").is_file():
        raise SpecError(f"{str(folder)!r} is no record: there is no spec.json in it")
    return Record(folder)


def _begins(record: Record, shown: str, name: str) -> bool:
    if len(name) <= SHOWN:
        return shown.startswith(name)
    whole = (read_json(record.folder / "spec.json") or {}).get("fingerprint", "")
    return name.startswith(shown) and str(whole).startswith(name)


def _unknown(name: str, outputs: Path) -> SpecError:
    known = [digits for digits, _ in all_records(outputs)]
    if not known:
        return SpecError(f"no record {name!r}: nothing was run below {str(outputs)!r} yet")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return SpecError(
        f"no record {name!r} below {str(outputs)!r}; {hint}give the folder of a record or the first digits "
        f"of its fingerprint: {_listed(known)}"
    )


def _ambiguous(name: str, found: list[Record]) -> SpecError:
    folders = [str(record.folder) for record in found]
    return SpecError(f"{name!r} is ambiguous, {len(found)} records begin so: {_listed(folders)}")


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
