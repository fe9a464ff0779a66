"""What runs measured of the machine that an outputs folder is on, for later estimates."""

from contextlib import suppress
from pathlib import Path

from gkd_lab.store.files import write_json

MACHINE_FILE = Path(".cache", "machine.json")


def write_import_seconds(root: Path, seconds: float) -> None:
    """Store how long loading torch and the libraries took; a full file system is no reason to stop."""
    with suppress(OSError):
        write_json(root / MACHINE_FILE, {"import_seconds": round(seconds, 2)})
