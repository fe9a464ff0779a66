"""Memory and time that a unit needs on a cluster: measured where it or its like has run, else estimated.

Both have a margin. A unit whose models are of unknown size asks for nothing, and the cluster's defaults hold.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.units import Unit
from gkd_lab.status.time_estimates import TimeEstimator
from gkd_lab.store.unit_files import UnitFiles, UnitRuns

BASE_BYTES = 3 * 2**29
"""A process with torch and transformers loaded, before it has a model: 0.65 GB were measured on a CPU."""
DEVICE_BYTES = 2**29
"""What the libraries of each GPU take of the node's memory beside that."""
MEMORY_MARGIN = 1.25
MEMORY_STEP_BYTES = 2**28
"""Memory is rounded up to a multiple of this, so that similar units can share a job array."""
TIME_MARGIN, EXTRA_SECONDS, TIME_STEP_SECONDS = 2.0, 900, 900
"""Twice the estimate and a quarter of an hour, which loading, evaluations and a slower node may take."""
_STATE_BYTES = 16
"""Bytes per parameter in training: weight, gradient and two moments in float32."""
_LOGIT_COPIES = 6
"""Logits of student and teacher, their log-probabilities and their gradients."""


@dataclass(frozen=True)
class UnitResources:
    """What a unit asks a cluster for; None: nothing, the cluster's default holds."""

    memory_bytes: int | None
    seconds: int | None
    is_measured: bool
    """Whether the memory is that of this unit or of one like it, margin included; else it is estimated."""


def estimate_resources(
    units: Sequence[Unit], files: UnitFiles, estimator: TimeEstimator, gpus: int = 0
) -> dict[str, UnitResources]:
    """Return unit id -> the memory and time it needs on a node with so many GPUs, with a margin."""
    runs = {unit.id: files.read_runs(unit.id) for unit in units}
    peaks = _list_peaks(units, runs)
    return {unit.id: _estimate_unit(unit, peaks, estimator, gpus) for unit in units}


def _estimate_unit(
    unit: Unit,
    peaks: Mapping[tuple[str, str], list[tuple[int, int]]],
    estimator: TimeEstimator,
    gpus: int,
) -> UnitResources:
    """Return what one unit needs. A measured peak of a unit with as many cells or more counts for it."""
    measured = [peak for cells, peak in peaks.get((unit.kind, unit.task), []) if cells >= _count_cells(unit)]
    memory = min(measured) if measured else _estimate_bytes(unit, estimator, gpus)
    seconds = _estimate_seconds(unit, estimator)
    return UnitResources(
        None if memory is None else _round_up(memory * MEMORY_MARGIN, MEMORY_STEP_BYTES),
        None if seconds is None else _round_up(seconds * TIME_MARGIN + EXTRA_SECONDS, TIME_STEP_SECONDS),
        bool(measured),
    )


def _list_peaks(
    units: Sequence[Unit], runs: Mapping[str, UnitRuns]
) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Return (kind, task) -> (number of cells, peak memory in bytes) of each unit that has run."""
    peaks: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for unit in units:
        peak = runs[unit.id].peak_bytes
        if peak is not None:
            peaks.setdefault((unit.kind, unit.task), []).append((_count_cells(unit), peak))
    return peaks


def _count_cells(unit: Unit) -> int:
    """Return the number of cells that train at once; 1 for an artifact."""
    return len(unit.cells) if unit.kind == "pack" else 1


def _estimate_bytes(unit: Unit, estimator: TimeEstimator, gpus: int) -> int | None:
    """Return the bytes of a process that trains the unit's models; None where a size is unknown."""
    training = unit.cells[0].training
    if isinstance(unit.spec, SftModel):
        model, copies, teacher = unit.spec, 1, None
        batch_size = 1 if model.sft is None else model.sft.batch_size
        tokens = model.max_input_tokens + model.max_output_tokens
    else:
        model, copies, teacher = training.start, _count_cells(unit), training.teacher
        batch_size, tokens = training.batch_size, training.max_input_tokens + training.max_output_tokens
    parameters = estimator.get_parameter_count("start", model)
    teacher_parameters = 0 if teacher is None else estimator.get_parameter_count("teacher", teacher)
    if parameters is None or teacher_parameters is None:
        return None
    logits = batch_size * tokens * (model.tokenizer.vocab_size or 0) * 4 * _LOGIT_COPIES
    process_bytes = BASE_BYTES + gpus * DEVICE_BYTES
    return process_bytes + copies * (_STATE_BYTES * parameters + logits) + 4 * teacher_parameters


def _estimate_seconds(unit: Unit, estimator: TimeEstimator) -> float | None:
    """Return the seconds of a pack like those that are finished, or by FLOPs at the scale nano; else None.

    The nominal rate of FLOPs is that of two CPU cores, which says nothing of larger models on a GPU.
    """
    if isinstance(unit.spec, SftModel):
        estimates = [estimator.estimate_artifact(unit.kind, unit.spec)]
    elif unit.kind == "pack":
        estimates = [
            estimator.estimate_cell(cell.training, is_packed=len(unit.cells) > 1) for cell in unit.cells
        ]
    else:
        return None
    usable = {"finished cells", "FLOPs"} if unit.scale == "nano" else {"finished cells"}
    if not all(estimate.basis in usable for estimate in estimates):
        return None
    return math.fsum(estimate.seconds or 0.0 for estimate in estimates)


def _round_up(value: float, step: int) -> int:
    """Return the smallest multiple of `step` that is at least `value`."""
    return math.ceil(value / step) * step
