"""Decide how many cells share a model, and keep the decision in the outputs folder.

The first process measures; later ones follow it, whatever their workers and free memory are, so that their
packs and with them their results are the same. Out of memory lowers what is kept, also after a kill by the
kernel.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gkd_lab.config.cell import Cell
from gkd_lab.config.packs import AUTO_PACK_SIZE, group_cells_into_packs, split_evenly
from gkd_lab.runner.control_groups import describe_kill_counts, has_killed_since
from gkd_lab.runner.memory import PackCapacity, compute_capacity, count_fitting_cells
from gkd_lab.runner.run_options import RunOptions, select_device
from gkd_lab.store import Record
from gkd_lab.store.attempts import is_marked_as_killed, read_attempt, record_attempt, remove_attempts
from gkd_lab.store.pack_limits import KeptLimit, PackLimits, Stage


def split_packs(cells: Sequence[Cell], options: RunOptions) -> list[list[Cell]]:
    """Return the cells grouped into packs; with pack auto of the size that the outputs folder keeps."""
    limits = PackLimits(options.outputs)
    return group_cells_into_packs(cells, limits.resolve_grid_limit(cells, options.pack, options.workers))


def keep_capacity(
    cells: Sequence[Cell], stage: Stage, options: RunOptions, measure_bytes: Callable[[], tuple[int, int]]
) -> PackCapacity:
    """Return the PackCapacity of cells that may share a model: the kept one, else measured and kept now.

    measure_bytes: returns the bytes that one cell needs, and those that are available. With a pack size of
    the user's nothing is measured; only a limit that a kill has left is kept to.
    """
    if len(cells) == 1:
        return PackCapacity(1)
    limits, device = PackLimits(options.outputs), name_device_kind()
    limit = limits.read_capacity(cells[0], stage, device)
    if options.pack != "auto":
        if limit is None or not limit.was_killed:
            return PackCapacity(len(cells))
        return _apply_limit(limit, cells, stage, options)
    if limit is None:
        bytes_per_cell, available_bytes = measure_bytes()
        reason = compute_capacity(len(cells), bytes_per_cell, available_bytes).reason
        fitting_cells = min(AUTO_PACK_SIZE, count_fitting_cells(bytes_per_cell, available_bytes))
        limit = limits.keep_capacity(cells[0], stage, device, KeptLimit(fitting_cells, reason))
    return _apply_limit(limit, cells, stage, options)


def _apply_limit(limit: KeptLimit, cells: Sequence[Cell], stage: Stage, options: RunOptions) -> PackCapacity:
    """Return the PackCapacity of even packs within a limit, and say why if these are not all of the cells."""
    size = split_evenly(len(cells), limit.cells)[0]
    if size == len(cells):
        return PackCapacity(size)
    reason = limit.reason or f"at most {limit.cells} cells as one model"
    options.reporter.say(f"{cells[0].task}: {'evaluation: ' if stage == 'evaluation' else ''}{reason}")
    return PackCapacity(size, reason)


def keep_shortage(cell: Cell, stage: Stage, options: RunOptions, capacity: PackCapacity) -> None:
    """Keep a lower capacity for cells like `cell` after more of them ran out of memory."""
    lowered = KeptLimit(capacity.max_cells, capacity.reason)
    PackLimits(options.outputs).lower_capacity(cell, stage, name_device_kind(), lowered)


def read_micro_batches(cell: Cell, options: RunOptions) -> int:
    """Return how many micro-batches a single cell's training starts with: 1, or more after kills."""
    limit = PackLimits(options.outputs).read_capacity(cell, "training", name_device_kind())
    return 1 if limit is None else limit.micro_batches


@contextmanager
def attempt_pack(
    cells: Sequence[Cell], stage: Stage, options: RunOptions, micro_batches: int = 1
) -> Iterator[None]:
    """Note in the cells' records, during the block, how many of them are in memory; see `absorb_kills`."""
    records = [options.store.get_record(cell) for cell in cells]
    facts: dict[str, Any] = {
        **{"stage": stage, "cells": len(cells), "micro_batches": micro_batches},
        **{"progress": _describe_progress(records[0], stage)},
    }
    previous = read_attempt(records[0]) or {}  # of a process whose end nothing is known of
    is_same = all(previous.get(name) == value for name, value in facts.items())
    facts["silent_deaths"] = previous.get("silent_deaths", 0) + 1 if is_same else 0
    with record_attempt(records, {**facts, "device": name_device_kind(), **describe_kill_counts()}):
        yield


def _describe_progress(record: Record, stage: Stage) -> str:
    """Return how far a record is: its newest checkpoint, or the number of its finished evaluations."""
    if stage == "evaluation":
        return f"{len(list(record.folder.glob('evaluations/*/status.json')))} evaluations"
    return max((path.name for path in record.steps_folder.glob("checkpoint-*")), key=_sort_key, default="")


def _sort_key(name: str) -> tuple[int, str]:
    """Return a key that sorts names which end with numbers by these: by length, then as text."""
    return len(name), name


def absorb_kills(cells: Sequence[Cell], options: RunOptions) -> None:
    """Lower the capacity if the kernel killed a process for lack of memory while it worked on these cells.

    Of a process on another machine that is not known: the second one in a row that ended without a word, and
    without progress, counts as such a kill. The caller holds the cells' locks.
    """
    for cell in cells:
        record = options.store.get_record(cell)
        attempt = read_attempt(record)
        if attempt is None:
            continue
        was_killed = True if is_marked_as_killed(attempt) else has_killed_since(attempt)
        if was_killed is None and not attempt.get("silent_deaths"):
            continue  # the next attempt counts this death
        if was_killed is not False:
            cause = "killed for lack of memory" if was_killed else "ended twice without a word"
            _lower_after_kill(cell, attempt, cause, options)
        remove_attempts([record])


def forget_attempts(cells: Sequence[Cell], options: RunOptions) -> None:
    """Remove what is left of earlier processes' attempts, once all work on the cells is done."""
    remove_attempts([options.store.get_record(cell) for cell in cells])


def _lower_after_kill(cell: Cell, attempt: dict[str, Any], cause: str, options: RunOptions) -> None:
    """Keep half of the cells that were in memory, or for a single cell smaller micro-batches, and say so."""
    tried, stage = int(attempt["cells"]), attempt["stage"]
    plural = "s" if tried > 1 else ""
    reason = f"{cause} with {tried} cell{plural} as one model"
    micro_batches = 1
    if tried == 1:
        rows = cell.training.batch_size
        tried_parts = int(attempt["micro_batches"])
        micro_batches = next((n for n in range(tried_parts + 1, rows + 1) if rows % n == 0), rows)
    limit = KeptLimit((tried + 1) // 2, reason, was_killed=True, micro_batches=micro_batches)
    if not PackLimits(options.outputs).lower_capacity(cell, stage, attempt["device"], limit):
        return  # another cell of the same pack has told it
    parts = f"rows of a batch in {micro_batches} parts" if tried == 1 else f"{limit.cells} at a time"
    options.reporter.say(f"{cell.task}: {reason}; going on with {parts}")


def name_device_kind() -> str:
    """Return the kind of device that cells train on, such as `cpu` or `NVIDIA H200`."""
    if select_device() == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(0)
