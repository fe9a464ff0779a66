"""A cell's own checkpoint to resume from: weights, optimizer slice and step, in safetensors and JSON.

A folder appears by rename when it is complete. The step's random choices need no state: they are keyed.
"""

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

PREFIX = "checkpoint-"


def folder_of(output_dir: str, step: int) -> Path:
    return Path(output_dir) / f"{PREFIX}{step}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def complete_steps(output_dir: str | Path) -> set[int]:
    """Steps that a run in `output_dir` can be resumed from."""
    return {step_of(folder) for folder in Path(output_dir).glob(f"{PREFIX}*") if _is_whole(folder)}


def _is_whole(folder: Path) -> bool:
    """Whether everything in it can be read: a write that was cut short leaves a run at an older step."""
    try:
        json.loads((folder / "trainer_state.json").read_bytes())
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt"):  # compares the header with the file's size
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return (folder / "model.safetensors").exists()


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes its name only when the block ends well."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def keep_only(output_dir: str, step: int) -> None:
    """Remove the checkpoints of other steps."""
    for other in complete_steps(output_dir) - {step}:
        shutil.rmtree(folder_of(output_dir, other), ignore_errors=True)


def save(
    folder: Path,
    parameters: Mapping[str, Tensor],
    views: Mapping[str, nn.Parameter],
    optimizer: Any,
) -> None:
    """Weights and the optimizer's state of one cell."""
    save_file({n: v.contiguous().cpu() for n, v in parameters.items()}, folder / "model.safetensors")
    tensors, scalars = {}, {}
    for name, view in views.items():
        for entry, value in optimizer.state.get(view, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{entry}:{name}"] = value.detach().contiguous().cpu()
            else:
                scalars[f"{entry}:{name}"] = value
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(json.dumps(scalars))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def load_optimizer(folder: Path, views: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    """Put the saved state back onto the cell's parameters."""
    entries: dict[str, Any] = dict(load_file(folder / "optimizer.safetensors"))
    entries.update(json.loads((folder / "optimizer.json").read_text()))
    inner = getattr(optimizer, "optimizer", optimizer)
    for key, value in entries.items():
        entry, _, name = key.partition(":")
        view = views[name]
        # AdamW's step counter stays where it was made; everything else follows its parameter.
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            value = value.to(view.device)
        inner.state[view][entry] = value


def set_schedule(scheduler: Any, optimizer: Any, step: int) -> None:
    """Bring a LambdaLR to `step` as if it had been stepped there."""
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    rates = [
        base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
