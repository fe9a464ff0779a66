"""What is not as it was written is set aside, under another name, and made again."""

from functools import cache
from pathlib import Path

from gkd_lab.runner.run_options import RunOptions
from gkd_lab.store import Record
from gkd_lab.store.file_hashes import compute_sha256, read_file_hashes
from gkd_lab.store.files import quarantine_path
from gkd_lab.training.checkpoints import list_complete_steps, quarantine_damaged_checkpoints


def repair_unfinished_training(record: Record, options: RunOptions) -> None:
    """Before a training goes on: drop damaged checkpoints; without a whole history it begins anew.

    The caller holds the record's lock.
    """
    for folder in quarantine_damaged_checkpoints(record.steps_folder):
        options.reporter.say(f"{folder.name}: not as it was written, set aside: {folder}")
    done = max(list_complete_steps(record.steps_folder), default=0)
    known = max(
        (row.get("step", 0) for row in record.read_history() if row.get("step", 0) <= done), default=0
    )
    if done - known >= options.log_every:
        quarantine_path(record.steps_folder)
        place = quarantine_path(record.metrics_file)
        options.reporter.say(f"{record.metrics_file} ends at step {known} of {done}, set aside: {place}")


def quarantine_damaged_result(record: Record, options: RunOptions) -> None:
    """A finished model, teacher's text or scores that are not as it was written is to be made again.

    The caller holds the record's lock.
    """
    damaged = find_damaged_file(record)
    if damaged is not None and record.read_status().get("state") == "done":
        # A folder as a whole: its files belong together.
        place = quarantine_path(record.folder / damaged.relative_to(record.folder).parts[0])
        record.status_file.unlink()
        where = "" if place is None else f", set aside: {place}"
        options.reporter.say(f"{damaged} is not as it was written{where}; it is made again")


def find_damaged_file(record: Record) -> Path | None:
    """What is gone or has changed of a finished model, text or scores; None where nothing was noted."""
    for name, known in (read_file_hashes(record.folder) or {}).items():
        path = record.folder / name
        if name.startswith(("checkpoint/", "scores/", "texts")) and _compute_current_sha256(path) != known:
            return path
    return None


def _compute_current_sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    facts = path.stat()
    return _compute_sha256_once(path, facts.st_mtime_ns, facts.st_size, facts.st_ino)


@cache
def _compute_sha256_once(path: Path, *_: int) -> str:
    """A model that many packs load is hashed by a process once."""
    return compute_sha256(path)
