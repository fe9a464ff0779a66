"""Why the cells of a starting student run alone, kept beside that student: finding out takes the model."""

from gkd_lab.store.files import read_json, write_json
from gkd_lab.store.record import Record

_FILE = "alone.json"


def kept_reason(start: Record) -> str | None:
    """Why copies of this student could not become one model when that was last tried; None: they could."""
    reason = (read_json(start.folder / _FILE) or {}).get("reason")
    return reason if isinstance(reason, str) else None


def keep_reason(start: Record, reason: str) -> None:
    """The next `plan` says it."""
    if kept_reason(start) != reason:
        write_json(start.folder / _FILE, {"reason": reason})


def forget_reason(start: Record) -> None:
    """A pack could be made after all."""
    (start.folder / _FILE).unlink(missing_ok=True)
