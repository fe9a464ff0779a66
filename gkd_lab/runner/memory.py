"""How many cells of a pack fit into memory, and going on with smaller packs where more do not.

What one cell needs is measured on the run's own trainer; that a pack needs K times as much is the estimate.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from gkd_lab.config.cell import Cell
from gkd_lab.config.packs import evenly
from gkd_lab.models.packing import CannotPack
from gkd_lab.runner.failures import PartFailed, kept_by
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.store import Part
from gkd_lab.store.pack_cache import keep_reason

USABLE = 0.8
"""Share of the free memory that a pack may take: other lengths and the allocator's gaps need some too."""

_SAYS_SO = ("out of memory", "can't allocate memory", "defaultcpuallocator")


@dataclass(frozen=True)
class Limit:
    """The most cells that share a model from here on, and why no more do."""

    cells: int
    why: str = ""


def in_packs(
    cells: Sequence[Cell],
    part_of: Callable[[Cell], Part],
    limit: Callable[[], Limit],
    work: Callable[[list[Cell], str], None],
    options: RunOptions,
) -> None:
    """Do `work` on the cells, pack after pack, in order; it hears why a pack is no larger.

    Cells that cannot be packed go one by one, a pack that runs out of memory is halved. An error fails the
    parts of its own pack and is kept there.
    """
    left, now = list(cells), Limit(len(cells))
    with suppress(PartFailed), kept_by(map(part_of, left), options.outputs):
        now = _smaller(limit, cells, options, measuring=True) or now
    release()
    while left := [cell for cell in left if not part_of(cell).status()]:
        chosen = left[: evenly(len(left), now.cells)[0]]
        parts, less = list(map(part_of, chosen)), None
        with suppress(PartFailed), kept_by(parts, options.outputs):
            less = _smaller(partial(work, chosen, now.why), chosen, options)
            assert less or all(part.status() for part in parts), "work leaves a verdict on each cell"
        release()
        now = less or now


def _smaller(
    work: Callable[[], Limit | None], cells: Sequence[Cell], options: RunOptions, *, measuring: bool = False
) -> Limit | None:
    """What `work` returns; where there cannot be a pack of these cells, the limit to go on with."""
    size, task = len(cells), cells[0].task
    try:
        found = work()
    except CannotPack as error:
        if size == 1:
            raise
        keep_reason(options.store.artifact(cells[0].scale, "start", cells[0].training.start), str(error))
        found = Limit(1, f"alone: {error}")
        options.reporter.say(f"{task}: {size} cells run alone, one after another: {error}")
    except (MemoryError, RuntimeError) as error:
        if size == 1 or not is_out_of_memory(error):
            raise
        found = Limit(1 if measuring else (size + 1) // 2, _ran_out(1 if measuring else size))
        options.reporter.say(f"{task}: {found.why}; going on with {found.cells} at a time")
    return found


def _ran_out(cells: int) -> str:
    return f"out of memory with {cells} cell{'s' * (cells > 1)} as one model"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; on a CPU PyTorch says so in a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAYS_SO)


def smaller_batches(cell: Cell, parts: int, error: BaseException, options: RunOptions) -> int:
    """Into how many parts a step's batch goes when `parts` were too few. Raises MemoryError below a row."""
    rows = cell.training.batch_size
    if parts == rows:
        raise MemoryError(
            f"out of memory even with one row at a time ({type(error).__name__}: {error}); take smaller "
            "models, shorter max_input_tokens and max_output_tokens, or a device with more memory"
        ) from error
    more = next(n for n in range(parts + 1, rows + 1) if rows % n == 0)
    options.reporter.say(
        f"{cell.task}: cell {cell.fingerprint}: out of memory with {rows // parts} rows at once; going on "
        f"with {rows // more}"
    )
    return more


def release() -> None:
    """Give back what a trainer that is no longer used still holds: its parts refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fitting(cells: int, bytes_of_one: int, free: int) -> Limit:
    """The limit for a pack of up to `cells` that need `bytes_of_one` each of `free` bytes."""
    most = max(1, int(USABLE * free / max(bytes_of_one, 1)))
    if most >= cells:
        return Limit(cells)
    size = evenly(cells, most)[0]
    needed = f"{cells} cells as one model need about {_gib(cells * bytes_of_one)}"
    return Limit(size, f"{needed}, {_gib(free)} are free: at most {size} at a time")


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def bytes_of_step(trainer: Any, inputs: dict[str, Tensor]) -> int:
    """What a trainer's only cell needs: weights, gradients, two moments, and a step's intermediate results.

    The last are the peak of allocations on a GPU; on a CPU, where no such count exists, they are what the
    forward pass saves for the backward pass. Adafactor's moments are smaller, so it has more room. Sampling
    has less to keep: of what the forward pass saves of a token, its cache holds the keys and values.
    """
    model = trainer.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    inputs = trainer._prepare_inputs(inputs)
    if trainer.args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.compute_loss(model, inputs).backward()
        gradients_and_more = torch.cuda.max_memory_allocated() - before
        model.zero_grad()
        return 3 * weights + gradients_and_more
    with saved_bytes(model) as saved:
        trainer.compute_loss(model, inputs).backward()
    model.zero_grad()
    return 4 * weights + sum(saved.values())


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Address -> bytes of each storage that forward passes inside save, without the model's own weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = max(storage.nbytes(), found.get(storage.data_ptr(), 0))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


def free_bytes(device: str) -> int:
    """Memory that can be had on `device`; on a CPU no more than the process's control group allows."""
    release()
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return min([psutil.virtual_memory().available, *of_control_group()])


_CONTROL_GROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Versions 2 and 1: the limit, what is taken, and what of that the kernel gives back when asked."""


def of_control_group(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What the limit on this process's control group leaves, if there is one."""
    for limit, taken, cached in _CONTROL_GROUPS:
        if (root / limit).exists() and (root / limit).read_text().strip() != "max":
            table = (root / limit).with_name("memory.stat").read_text().split()
            counts = dict(zip(table[::2], table[1::2], strict=True))
            used = int((root / taken).read_text()) - int(counts.get(cached, 0))
            yield max(0, int((root / limit).read_text()) - used)
