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
from gkd_lab.config.packs import split_evenly
from gkd_lab.models.packing import CannotPack
from gkd_lab.runner.failures import RecordedFailure, record_failures
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.store import RecordPart

USABLE_SHARE = 0.8
"""Share of the free memory that a pack may take: other lengths and the allocator's gaps need some too."""

_OUT_OF_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "defaultcpuallocator")


@dataclass(frozen=True)
class PackCapacity:
    """The most cells that share a model from here on, and why no more do."""

    max_cells: int
    reason: str = ""


def run_packs(
    cells: Sequence[Cell],
    get_part: Callable[[Cell], RecordPart],
    measure_capacity: Callable[[], PackCapacity],
    work: Callable[[list[Cell], str], None],
    options: RunOptions,
) -> None:
    """Do `work` on the cells, pack after pack, in order; it hears why a pack is no larger.

    Cells that cannot be packed go one by one, a pack that runs out of memory is halved. An error fails the
    parts of its own pack and is kept there.
    """
    left, now = list(cells), PackCapacity(len(cells))
    with suppress(RecordedFailure), record_failures(map(get_part, left), options.outputs):
        now = _run_or_shrink(measure_capacity, cells, options, measuring=True) or now
    release_memory()
    while left := [cell for cell in left if not get_part(cell).read_status()]:
        chosen = left[: split_evenly(len(left), now.max_cells)[0]]
        parts, less = list(map(get_part, chosen)), None
        with suppress(RecordedFailure), record_failures(parts, options.outputs):
            less = _run_or_shrink(partial(work, chosen, now.reason), chosen, options)
            assert less or all(part.read_status() for part in parts), "work leaves a verdict on each cell"
        release_memory()
        now = less or now


def _run_or_shrink(
    work: Callable[[], PackCapacity | None],
    cells: Sequence[Cell],
    options: RunOptions,
    *,
    measuring: bool = False,
) -> PackCapacity | None:
    """What `work` returns; where there cannot be a pack of these cells, the limit to go on with."""
    size, task = len(cells), cells[0].task
    try:
        found = work()
    except CannotPack as error:
        if size == 1:
            raise
        options.store.get_sft_student(cells[0]).write_unpackable_reason(str(error))
        found = PackCapacity(1, f"alone: {error}")
        options.reporter.say(f"{task}: {size} cells run alone, one after another: {error}")
    except (MemoryError, RuntimeError) as error:
        if size == 1 or not is_out_of_memory_error(error):
            raise
        found = PackCapacity(
            1 if measuring else (size + 1) // 2, _format_out_of_memory(1 if measuring else size)
        )
        options.reporter.say(f"{task}: {found.reason}; going on with {found.max_cells} at a time")
    return found


def _format_out_of_memory(cells: int) -> str:
    return f"out of memory with {cells} cell{'s' * (cells > 1)} as one model"


def is_out_of_memory_error(error: BaseException) -> bool:
    """Whether an allocation failed; on a CPU PyTorch says so in a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in _OUT_OF_MEMORY_PHRASES
    )


def increase_micro_batches(cell: Cell, micro_batches: int, error: BaseException, options: RunOptions) -> int:
    """Into how many parts a step's batch goes when `parts` were too few. Raises MemoryError below a row."""
    rows = cell.training.batch_size
    if micro_batches == rows:
        raise MemoryError(
            f"out of memory even with one row at a time ({type(error).__name__}: {error}); take smaller "
            "models, shorter max_input_tokens and max_output_tokens, or a device with more memory"
        ) from error
    more = next(n for n in range(micro_batches + 1, rows + 1) if rows % n == 0)
    options.reporter.say(
        f"{cell.task}: cell {cell.fingerprint}: out of memory with {rows // micro_batches} rows at once; going on "
        f"with {rows // more}"
    )
    return more


def release_memory() -> None:
    """Give back what a trainer that is no longer used still holds: its parts refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compute_capacity(cells: int, bytes_per_cell: int, available_bytes: int) -> PackCapacity:
    """The limit for a pack of up to `cells` that need `bytes_of_one` each of `free` bytes."""
    most = max(1, int(USABLE_SHARE * available_bytes / max(bytes_per_cell, 1)))
    if most >= cells:
        return PackCapacity(cells)
    size = split_evenly(cells, most)[0]
    needed = f"{cells} cells as one model need about {_format_gib(cells * bytes_per_cell)}"
    return PackCapacity(size, f"{needed}, {_format_gib(available_bytes)} are free: at most {size} at a time")


def _format_gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def measure_step_bytes(trainer: Any, inputs: dict[str, Tensor]) -> int:
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
    with record_saved_bytes(model) as saved:
        trainer.compute_loss(model, inputs).backward()
    model.zero_grad()
    return 4 * weights + sum(saved.values())


@contextmanager
def record_saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
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


def measure_free_bytes(device: str) -> int:
    """Memory that can be had on `device`; on a CPU no more than the process's control group allows."""
    release_memory()
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return min([psutil.virtual_memory().available, *iterate_cgroup_free_bytes()])


_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Versions 2 and 1: the limit, what is taken, and what of that the kernel gives back when asked."""


def iterate_cgroup_free_bytes(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What the limit on this process's control group leaves, if there is one."""
    for limit, taken, cached in _CGROUP_FILES:
        if (root / limit).exists() and (root / limit).read_text().strip() != "max":
            table = (root / limit).with_name("memory.stat").read_text().split()
            counts = dict(zip(table[::2], table[1::2], strict=True))
            used = int((root / taken).read_text()) - int(counts.get(cached, 0))
            yield max(0, int((root / limit).read_text()) - used)
