"""Quarantine corrupt files under another name, so that they are rebuilt."""

from functools import cache
from pathlib import Path

from gkd_lab.config.content_hashes import compute_sha256
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.store import Record
from gkd_lab.store.file_hashes import read_file_hashes
from gkd_lab.store.files import quarantine_path
from gkd_lab.training.checkpoints import list_complete_steps, quarantine_damaged_checkpoints


def repair_unfinished_training(record: Record, options: RunOptions) -> None:
    """Rename damaged resume checkpoints; if rows of the history are missing, rename all and the history too.

    Renamed files are not read again, so that the training starts earlier. The caller holds the record's lock.
    """
    for folder in quarantine_damaged_checkpoints(record.steps_folder):
        options.reporter.say(f"{folder.name}: damaged since it was written, set aside: {folder}")
    checkpoint_step = max(list_complete_steps(record.steps_folder), default=0)
    logged_steps = (row.get("step", 0) for row in record.read_history())
    history_step = max((step for step in logged_steps if step <= checkpoint_step), default=0)
    if checkpoint_step - history_step >= options.log_every:
        quarantine_path(record.steps_folder)
        quarantined_path = quarantine_path(record.metrics_file)
        options.reporter.say(
            f"{record.metrics_file} ends at step {history_step} of {checkpoint_step}, "
            f"set aside: {quarantined_path}"
        )


def quarantine_damaged_result(record: Record, options: RunOptions) -> None:
    """If a done record's model, text or scores are damaged, rename them and delete the status.

    They count as missing then and are built again. The caller holds the record's lock.
    """
    damaged_file = find_damaged_file(record)
    if damaged_file is not None and record.read_status().get("state") == "done":
        # The whole folder, because its files belong together.
        quarantined_path = quarantine_path(record.folder / damaged_file.relative_to(record.folder).parts[0])
        record.clear_status()
        notice = "" if quarantined_path is None else f", set aside: {quarantined_path}"
        options.reporter.say(f"{damaged_file} is damaged{notice}; it is built again")


def find_damaged_file(record: Record) -> Path | None:
    """Return the first model, text or score file that is missing or differs from its stored hash, or None."""
    for name, sha256 in (read_file_hashes(record.folder) or {}).items():
        path = record.folder / name
        if name.startswith(("checkpoint", "scores/", "texts")) and _compute_current_sha256(path) != sha256:
            return path
    return None


def _compute_current_sha256(path: Path) -> str | None:
    """Return a file's SHA-256, or None without a file; cached while time, size and inode are unchanged."""
    if not path.is_file():
        return None
    file_status = path.stat()
    return _compute_sha256_once(path, file_status.st_mtime_ns, file_status.st_size, file_status.st_ino)


@cache
def _compute_sha256_once(path: Path, *_: int) -> str:
    """Return a file's SHA-256; cached in this process by all arguments: path, time, size and inode."""
    return compute_sha256(path)
