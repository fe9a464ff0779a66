"""Checkpoints of single cells: weights and optimizer state in safetensors and JSON, sealed with checksums.

A folder appears by rename when it is complete. Random choices need no state: they are keyed by the step.
"""

import glob
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gkd_lab.config.content_hashes import compute_sha256
from gkd_lab.store.files import remove_folder
from gkd_lab.store.heartbeat import require_lock

CHECKPOINT_PREFIX = "checkpoint-"


def build_checkpoint_path(output_dir: str, step: int) -> Path:
    """Return the path `output_dir/checkpoint-STEP`, transformers' name for it; nothing is created."""
    return Path(output_dir) / f"{CHECKPOINT_PREFIX}{step}"


def parse_checkpoint_step(folder: Path) -> int:
    """Return the step number in a folder's name, `checkpoint-STEP`; other names raise ValueError."""
    return int(folder.name.removeprefix(CHECKPOINT_PREFIX))


def list_complete_steps(output_dir: str | Path) -> set[int]:
    """Return the set of steps whose `checkpoint-STEP` folder is intact; a run can be resumed from each."""
    return {
        parse_checkpoint_step(folder)
        for folder in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*")
        if _is_checkpoint_intact(folder)
    }


CHECKSUM_FILE = "sha256.json"
"""SHA-256 of every other file in a checkpoint's folder, by name; written last."""


def write_checksums(folder: Path) -> None:
    """Write `sha256.json` into the folder: relative path -> SHA-256 of every other file below it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CHECKSUM_FILE)
    checksums = {path.relative_to(folder).as_posix(): compute_sha256(path) for path in files}
    (folder / CHECKSUM_FILE).write_text(json.dumps(checksums))


def quarantine_damaged_checkpoints(output_dir: str | Path) -> list[Path]:
    """Rename each damaged `checkpoint-N` to `damaged-checkpoint-N`, replacing an older one; return these."""
    quarantined = []
    for folder in sorted(Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*")):
        if not _is_checkpoint_intact(folder):
            new_folder = folder.with_name(f"damaged-{folder.name}")
            require_lock(folder)
            shutil.rmtree(new_folder, ignore_errors=True)
            quarantined.append(folder.rename(new_folder))
    return quarantined


def _is_checkpoint_intact(folder: Path) -> bool:
    """Whether all files listed in `sha256.json` match it; if it is missing, whether the files parse."""
    try:
        if (folder / CHECKSUM_FILE).exists():
            checksums: dict[str, str] = json.loads((folder / CHECKSUM_FILE).read_bytes())
            return all(compute_sha256(folder / name) == value for name, value in checksums.items())
        json.loads((folder / "trainer_state.json").read_bytes())
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt"):  # compares the header with the file's size
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return (folder / "model.safetensors").exists()


@contextmanager
def create_folder_atomically(folder: Path) -> Iterator[Path]:
    """Yield an empty hidden folder to fill; after a block without error it replaces `folder`, by rename.

    Raises LockLost before and after the block if this process has lost the lock around `folder`.
    """
    require_lock(folder)
    for abandoned_part in folder.parent.glob(f".{glob.escape(folder.name)}.*.part"):
        shutil.rmtree(abandoned_part, ignore_errors=True)
    # A name of its own: a process that has lost its lock may still be filling the other.
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
    part.mkdir(parents=True)
    yield part
    require_lock(folder)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def remove_other_checkpoints(output_dir: str, step: int) -> None:
    """Delete all `checkpoint-*` folders of `output_dir`, older and newer, except that of `step`."""
    for other in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*"):
        if other != build_checkpoint_path(output_dir, step):
            remove_folder(other)


def save_cell_checkpoint(
    folder: Path, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Any]
) -> None:
    """Write one cell's weights to `model.safetensors`, its optimizer state to `optimizer.*`.

    optimizer_state: `ENTRY:NAME` -> tensor or number, as `load_optimizer_state` returns it.
    """
    save_file({n: v.contiguous().cpu() for n, v in weights.items()}, folder / "model.safetensors")
    tensors = {key: value for key, value in optimizer_state.items() if isinstance(value, Tensor)}
    save_file(
        {key: value.detach().contiguous().cpu() for key, value in tensors.items()},
        folder / "optimizer.safetensors",
    )
    scalars = {key: value for key, value in optimizer_state.items() if key not in tensors}
    (folder / "optimizer.json").write_text(json.dumps(scalars))


def load_checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    """Return the folder's `model.safetensors` as a dict: parameter name -> tensor on the CPU."""
    return load_file(folder / "model.safetensors")


def load_optimizer_state(folder: Path) -> dict[str, Any]:
    """Return a cell's saved optimizer state: `ENTRY:NAME` -> tensor on the CPU, or number."""
    tensors: dict[str, Any] = load_file(folder / "optimizer.safetensors")
    return tensors | json.loads((folder / "optimizer.json").read_text())


def set_scheduler_step(scheduler: Any, optimizer: Any, step: int) -> None:
    """Set a LambdaLR's counter to `step`, and its optimizer's learning rates to the schedule's there."""
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    rates = [
        base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
