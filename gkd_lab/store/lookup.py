"""Find the record that a user names by its folder or by the first digits of its fingerprint."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gkd_lab.config.errors import ConfigError
from gkd_lab.config.fingerprint import SHOWN_DIGITS
from gkd_lab.store.files import read_json
from gkd_lab.store.record import Record

_RECORD_FOLDER = re.compile(rf".*-([0-9a-f]{{{SHOWN_DIGITS}}})")
_HEX_DIGITS = re.compile(r"[0-9a-f]{1,64}")
_MAX_LISTED = 5


def find_record(name: str, outputs: Path) -> Record:
    """Return the record of a cell, teacher or SFT student by its folder or the start of its fingerprint.

    Raises ConfigError where no record or more than one matches.
    """
    folder = Path(name)
    if name and folder.is_dir() and not _HEX_DIGITS.fullmatch(name):
        return _open_record_folder(folder)
    all_records = list(iterate_records(outputs))
    records = [record for digits, record in all_records if _matches_fingerprint(record, digits, name)]
    if not records:
        raise _make_unknown_record_error(name, outputs, [digits for digits, _ in all_records])
    if len(records) > 1:
        folders = _format_names([str(record.folder) for record in records])
        raise ConfigError(f"{name!r} is ambiguous: it matches {len(records)} records: {folders}")
    return records[0]


def iterate_records(outputs: Path) -> Iterator[tuple[str, Record]]:
    """Yield (short fingerprint, record) for every record below the outputs folder, sorted by path."""
    for path in sorted(outputs.glob("*/*/*/spec.json")):
        match = _RECORD_FOLDER.fullmatch(path.parent.name)
        if match:
            yield match[1], Record(path.parent)


def _open_record_folder(folder: Path) -> Record:
    """Return the record in a folder. ConfigError: an evaluation's folder, or one without spec.json."""
    if folder.resolve().parent.name == "evaluations":
        raise ConfigError(f"{str(folder)!r} is an evaluation; its record is {str(folder.parent.parent)!r}")
    if not (folder / "spec.json").is_file():
        raise ConfigError(f"{str(folder)!r} is not a record: it has no spec.json")
    return Record(folder)


def _matches_fingerprint(record: Record, short_fingerprint: str, prefix: str) -> bool:
    """Return whether a record's fingerprint starts with `prefix`; over 8 digits are read from `spec.json`."""
    if len(prefix) <= SHOWN_DIGITS:
        return short_fingerprint.startswith(prefix)
    fingerprint = (read_json(record.folder / "spec.json") or {}).get("fingerprint", "")
    return prefix.startswith(short_fingerprint) and str(fingerprint).startswith(prefix)


def _make_unknown_record_error(name: str, outputs: Path, fingerprints: Sequence[str]) -> ConfigError:
    """Return (not raise) the ConfigError for a name that matches no record, with the nearest fingerprint."""
    if not fingerprints:
        return ConfigError(f"no record {name!r}: {str(outputs)!r} has no records yet")
    close = difflib.get_close_matches(name, fingerprints, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(
        f"no record {name!r} below {str(outputs)!r}; {hint}give the folder of a record or the first digits "
        f"of its fingerprint: {_format_names(fingerprints)}"
    )


def _format_names(names: Sequence[str]) -> str:
    """Return the first 5 names joined by commas, then `and N more` if some are left out."""
    omitted = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {omitted} more" if omitted > 0 else "")
