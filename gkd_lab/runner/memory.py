"""Size packs by memory: measure how many cells fit, and halve a pack that runs out of memory.

The memory of one cell is measured on the run's own trainer; a pack of K cells is estimated to need K times as
much.
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
from gkd_lab.config.library_errors import OUT_OF_MEMORY_REMEDY, is_out_of_memory_text
from gkd_lab.config.packs import split_evenly
from gkd_lab.models.packing import CannotPack
from gkd_lab.runner.control_groups import iterate_group_free_bytes
from gkd_lab.runner.failures import RecordedFailure, record_failures
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.store import RecordPart

USABLE_SHARE = 0.8
"""Share of the free memory that a pack may use; longer batches and fragmentation need the rest."""


@dataclass(frozen=True)
class PackCapacity:
    """Largest number of cells that may share a model, and the reason why no more do."""

    max_cells: int
    reason: str = ""
    is_memory_short: bool = False
    """Whether more cells have run out of memory."""


def run_packs(
    cells: Sequence[Cell],
    get_part: Callable[[Cell], RecordPart],
    measure_capacity: Callable[[], PackCapacity],
    work: Callable[[list[Cell], str], None],
    options: RunOptions,
    report_shortage: Callable[[PackCapacity], None] = lambda _: None,
) -> None:
    """Split cells into packs that fit into memory, and call `work(pack, reason)` until each has a status.

    get_part: returns the part of a cell's record that `work` finishes. measure_capacity: returns how many
    cells fit. reason: why the pack is no larger. Cells that cannot be packed run alone, and a pack that runs
    out of memory is halved. An error marks the parts of its own pack as failed. report_shortage: called with
    the capacity that is left after running out of memory.
    """
    capacity = PackCapacity(len(cells))
    with suppress(RecordedFailure), record_failures(map(get_part, cells), options.outputs):
        capacity = _run_or_shrink(measure_capacity, cells, options, is_measuring=True) or capacity
        if capacity.is_memory_short:
            report_shortage(capacity)
    release_memory()
    while unfinished_cells := [cell for cell in cells if not get_part(cell).read_status()]:
        pack = unfinished_cells[: split_evenly(len(unfinished_cells), capacity.max_cells)[0]]
        parts, smaller_capacity = list(map(get_part, pack)), None
        with suppress(RecordedFailure), record_failures(parts, options.outputs):
            smaller_capacity = _run_or_shrink(partial(work, pack, capacity.reason), pack, options)
            assert smaller_capacity or all(part.read_status() for part in parts), "each cell has a status"
        release_memory()
        if smaller_capacity is not None and smaller_capacity.is_memory_short:
            report_shortage(smaller_capacity)
        capacity = smaller_capacity or capacity


def _run_or_shrink(
    work: Callable[[], PackCapacity | None],
    cells: Sequence[Cell],
    options: RunOptions,
    *,
    is_measuring: bool = False,
) -> PackCapacity | None:
    """Return `work()`; if several cells cannot be packed or run out of memory, a smaller PackCapacity.

    The capacity is 1 after CannotPack, half of the cells after out of memory, and 1 if that was while
    measuring. A single cell's error is raised.
    """
    size, task = len(cells), cells[0].task
    try:
        return work()
    except CannotPack as error:
        if size == 1:
            raise
        options.store.get_sft_student(cells[0]).write_unpackable_reason(str(error))
        options.reporter.say(f"{task}: {size} cells run alone, one after another: {error}")
        return PackCapacity(1, f"alone: {error}")
    except (MemoryError, RuntimeError) as error:
        if size == 1 or not is_out_of_memory_error(error):
            raise
        tried_size = 1 if is_measuring else size
        plural = "s" if tried_size > 1 else ""
        reason = f"out of memory with {tried_size} cell{plural} as one model"
        capacity = PackCapacity((tried_size + 1) // 2, reason, is_memory_short=True)
        options.reporter.say(f"{task}: {reason}; going on with {capacity.max_cells} at a time")
        return capacity


def is_out_of_memory_error(error: BaseException) -> bool:
    """Return whether the error means out of memory, by its type or, as PyTorch's on a CPU, by its message."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and is_out_of_memory_text(str(error))


def increase_micro_batches(cell: Cell, micro_batches: int, error: BaseException, options: RunOptions) -> int:
    """Return the batch size's next larger divisor. Raises MemoryError if `micro_batches` is that size."""
    rows = cell.training.batch_size
    if micro_batches == rows:
        raise MemoryError(f"out of memory even with one row at a time: {OUT_OF_MEMORY_REMEDY}") from error
    increased = next(n for n in range(micro_batches + 1, rows + 1) if rows % n == 0)
    options.reporter.say(
        f"{cell.task}: cell {cell.fingerprint}: out of memory with {rows // micro_batches} rows at once; "
        f"going on with {rows // increased}"
    )
    return increased


def release_memory() -> None:
    """Collect garbage, such as unused trainers, whose objects refer to each other, and empty CUDA's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compute_capacity(cells: int, bytes_per_cell: int, available_bytes: int) -> PackCapacity:
    """Return the PackCapacity of even packs that fit into 80 % of `available_bytes`; reason if below `cells`.

    Even packs: 10 cells of which 6 fit give packs of 5. It is at least 1.
    """
    max_cells = count_fitting_cells(bytes_per_cell, available_bytes)
    if max_cells >= cells:
        return PackCapacity(cells)
    size = split_evenly(cells, max_cells)[0]
    needed = f"{cells} cells as one model need about {_format_gib(cells * bytes_per_cell)}"
    return PackCapacity(size, f"{needed}, {_format_gib(available_bytes)} are free: at most {size} at a time")


def count_fitting_cells(bytes_per_cell: int, available_bytes: int) -> int:
    """Return how many cells fit into 80 % of the available bytes, at least 1."""
    return max(1, int(USABLE_SHARE * available_bytes / max(bytes_per_cell, 1)))


def _format_gib(size: int) -> str:
    """Return bytes as text in GiB with three significant digits, such as `1.23 GiB`."""
    return f"{size / 2**30:.3g} GiB"


def measure_step_bytes(trainer: Any, inputs: dict[str, Tensor]) -> int:
    """Run forward and backward pass of one batch; return the bytes that one cell needs in a training step.

    They are those of weights, gradients, two moments and activations. Activations are the peak of allocations
    on a GPU, and on a CPU, which does not count them, the tensors that the forward pass saves for the
    backward pass. Adafactor's moments are smaller, so it has room to spare; so has sampling: its
    cache stores only the keys and values of each token, and its copy of the weights is freed before there are
    gradients.
    """
    model = trainer.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    inputs = trainer._prepare_inputs(inputs)
    if trainer.args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.compute_loss(model, inputs).backward()
        gradients_and_activations = torch.cuda.max_memory_allocated() - before
        model.zero_grad()
        return 3 * weights + gradients_and_activations
    with record_saved_bytes(model) as saved_bytes:
        trainer.compute_loss(model, inputs).backward()
    model.zero_grad()
    return 4 * weights + sum(saved_bytes.values())


@contextmanager
def record_saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Yield a dict that fills with {address: bytes} of storages saved for backward, without the weights."""
    weight_addresses = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved_bytes: dict[int, int] = {}

    def record_storage(tensor: Tensor) -> Tensor:
        """Add the tensor's storage to `saved_bytes`, unless it is a weight's; return the tensor unchanged."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in weight_addresses:
            saved_bytes[address] = max(storage.nbytes(), saved_bytes.get(address, 0))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor):
        yield saved_bytes


def measure_free_bytes(device: str, root: Path = Path("/")) -> int:
    """Release unused memory, then return the free bytes of the GPU, or of the machine and control groups.

    root: the folder below which `/proc` and `/sys` tell the limits of this process's groups.
    """
    release_memory()
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return min([psutil.virtual_memory().available, *iterate_group_free_bytes(root)])
