"""A cell's own checkpoint to resume from: weights, optimizer slice and step, in safetensors and JSON.

A folder appears by rename when it is complete. The step's random choices need no state: they are keyed.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CHECKPOINT_PREFIX = "checkpoint-"


def build_checkpoint_path(output_dir: str, step: int) -> Path:
    return Path(output_dir) / f"{CHECKPOINT_PREFIX}{step}"


def parse_checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix(CHECKPOINT_PREFIX))


def list_complete_steps(output_dir: str | Path) -> set[int]:
    """Steps that a run in `output_dir` can be resumed from."""
    return {
        parse_checkpoint_step(folder)
        for folder in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*")
        if _is_checkpoint_intact(folder)
    }


CHECKSUM_FILE = "sha256.json"
"""File name -> SHA-256 of all others in a checkpoint's folder, written last."""


def write_checksums(folder: Path) -> None:
    """Note what is in a checkpoint, so that a changed bit is found before anything is made of it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CHECKSUM_FILE)
    found = {path.relative_to(folder).as_posix(): _compute_sha256(path) for path in files}
    (folder / CHECKSUM_FILE).write_text(json.dumps(found))


def quarantine_damaged_checkpoints(output_dir: str | Path) -> list[Path]:
    """Rename the checkpoints that are not as they were written; returns where they are now."""
    aside = []
    for folder in sorted(Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*")):
        if not _is_checkpoint_intact(folder):
            place = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(place, ignore_errors=True)
            aside.append(folder.rename(place))
    return aside


def _compute_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_checkpoint_intact(folder: Path) -> bool:
    """Whether everything in it is as it was written; of one that was not sealed, whether it can be read."""
    try:
        if (folder / CHECKSUM_FILE).exists():
            sealed: dict[str, str] = json.loads((folder / CHECKSUM_FILE).read_bytes())
            return all(_compute_sha256(folder / name) == known for name, known in sealed.items())
        json.loads((folder / "trainer_state.json").read_bytes())
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt"):  # compares the header with the file's size
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return (folder / "model.safetensors").exists()


@contextmanager
def create_folder_atomically(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes its name only when the block ends well."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def remove_other_checkpoints(output_dir: str, step: int) -> None:
    """Remove the checkpoints of other steps."""
    for other in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*"):
        if other != build_checkpoint_path(output_dir, step):
            shutil.rmtree(other, ignore_errors=True)


def save_cell_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    parameter_views: Mapping[str, nn.Parameter],
    optimizer: Any,
) -> None:
    """Weights and the optimizer's state of one cell."""
    save_file({n: v.contiguous().cpu() for n, v in weights.items()}, folder / "model.safetensors")
    tensors, scalars = {}, {}
    for name, view in parameter_views.items():
        for entry, value in optimizer.state.get(view, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{entry}:{name}"] = value.detach().contiguous().cpu()
            else:
                scalars[f"{entry}:{name}"] = value
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(json.dumps(scalars))


def load_checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def load_optimizer_state(folder: Path, parameter_views: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    """Put the saved state back onto the cell's parameters."""
    entries: dict[str, Any] = dict(load_file(folder / "optimizer.safetensors"))
    entries.update(json.loads((folder / "optimizer.json").read_text()))
    inner = getattr(optimizer, "optimizer", optimizer)
    for key, value in entries.items():
        entry, _, name = key.partition(":")
        view = parameter_views[name]
        # AdamW's step counter stays where it was made; everything else follows its parameter.
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            value = value.to(view.device)
        inner.state[view][entry] = value


def set_scheduler_step(scheduler: Any, optimizer: Any, step: int) -> None:
    """Bring a LambdaLR to `step` as if it had been stepped there."""
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    rates = [
        base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
