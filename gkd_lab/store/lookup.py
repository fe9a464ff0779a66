"""Which record a user means: its folder, or the first digits of its fingerprint."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from gkd_lab.config.errors import ConfigError
from gkd_lab.config.fingerprint import SHOWN_DIGITS
from gkd_lab.store.files import read_json
from gkd_lab.store.record import Record

_RECORD_FOLDER = re.compile(rf".*-([0-9a-f]{{{SHOWN_DIGITS}}})")
_HEX_DIGITS = re.compile(r"[0-9a-f]{1,64}")
_MAX_LISTED = 10


def find_record(name: str, outputs: Path) -> Record:
    """The record of a cell, a teacher or a starting student that `name` stands for. Raises SpecError."""
    folder = Path(name)
    if name and folder.is_dir() and not _HEX_DIGITS.fullmatch(name):
        return _open_record_folder(folder)
    found = [
        record for digits, record in iterate_records(outputs) if _matches_fingerprint(record, digits, name)
    ]
    if len(found) == 1:
        return found[0]
    raise (
        _make_unknown_record_error(name, outputs) if not found else _make_ambiguous_record_error(name, found)
    )


def iterate_records(outputs: Path) -> Iterator[tuple[str, Record]]:
    """(shown fingerprint, record) of everything that was begun below the outputs folder, by name."""
    for path in sorted(outputs.glob("*/*/*/spec.json")):
        match = _RECORD_FOLDER.fullmatch(path.parent.name)
        if match:
            yield match[1], Record(path.parent)


def _open_record_folder(folder: Path) -> Record:
    if folder.resolve().parent.name == "evaluations":
        raise ConfigError(f"{str(folder)!r} is an evaluation; its record is {str(folder.parent.parent)!r}")
    if not (folder / "spec.json").is_file():
        raise ConfigError(f"{str(folder)!r} is no record: there is no spec.json in it")
    return Record(folder)


def _matches_fingerprint(record: Record, short_fingerprint: str, prefix: str) -> bool:
    if len(prefix) <= SHOWN_DIGITS:
        return short_fingerprint.startswith(prefix)
    whole = (read_json(record.folder / "spec.json") or {}).get("fingerprint", "")
    return prefix.startswith(short_fingerprint) and str(whole).startswith(prefix)


def _make_unknown_record_error(name: str, outputs: Path) -> ConfigError:
    known = [digits for digits, _ in iterate_records(outputs)]
    if not known:
        return ConfigError(f"no record {name!r}: nothing was run below {str(outputs)!r} yet")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(
        f"no record {name!r} below {str(outputs)!r}; {hint}give the folder of a record or the first digits "
        f"of its fingerprint: {_format_names(known)}"
    )


def _make_ambiguous_record_error(name: str, records: list[Record]) -> ConfigError:
    folders = [str(record.folder) for record in records]
    return ConfigError(f"{name!r} is ambiguous, {len(records)} records begin so: {_format_names(folders)}")


def _format_names(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
