"""Why the cells of a starting student run alone, kept beside that student: finding out takes the model."""

from gkd_lab.store.files import read_json, write_json
from gkd_lab.store.record import Record

_UNPACKABLE_FILE = "alone.json"


def read_unpackable_reason(sft_student: Record) -> str | None:
    """Why copies of this student could not become one model when that was last tried; None: they could."""
    reason = (read_json(sft_student.folder / _UNPACKABLE_FILE) or {}).get("reason")
    return reason if isinstance(reason, str) else None


def write_unpackable_reason(sft_student: Record, reason: str) -> None:
    """The next `plan` says it."""
    if read_unpackable_reason(sft_student) != reason:
        write_json(sft_student.folder / _UNPACKABLE_FILE, {"reason": reason})


def delete_unpackable_reason(sft_student: Record) -> None:
    """A pack could be made after all."""
    (sft_student.folder / _UNPACKABLE_FILE).unlink(missing_ok=True)
