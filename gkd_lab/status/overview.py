"""What `plan` and `status` say of a grid: cells, their state and cost, what collapses, what differs.

Plain data; neither torch nor pandas, so that the answer comes at once.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd_lab.config import Cell, Grid
from gkd_lab.config.cell import list_references
from gkd_lab.config.fingerprint import SHOWN_DIGITS, canonical_json
from gkd_lab.config.packs import PackLimit, explain_unpackable, group_cells_into_packs
from gkd_lab.status.cell_status import CellProgress, read_progress
from gkd_lab.status.time_estimates import EstimateBasis, TimeEstimator, create_estimator
from gkd_lab.store import State, Store
from gkd_lab.store.index import RecordIndex
from gkd_lab.store.pack_cache import read_unpackable_reason


@dataclass(frozen=True)
class CellView:
    """One line of a listing."""

    cell: Cell
    progress: CellProgress
    pack: int
    unpacked_reason: str | None
    """Why no other cell shares its model, if it is not for the limit that was asked for."""
    estimated_seconds: float | None
    """Estimate for the whole training: alone, or its share of the pack."""
    estimate_basis: EstimateBasis
    """What the estimate was made of."""

    @property
    def state(self) -> State:
        return self.progress.state

    @property
    def error(self) -> str | None:
        """The last line of what it failed with."""
        return self.progress.error

    @property
    def seconds_left(self) -> float | None:
        """Of the estimate."""
        if self.state == "done":
            return 0.0
        share = 1 - self.progress.step / self.cell.training.steps
        return None if self.estimated_seconds is None else self.estimated_seconds * share


@dataclass(frozen=True)
class ArtifactView:
    """A teacher or a starting student."""

    role: str
    name: str
    state: State
    estimated_seconds: float | None
    error: str | None
    """The last line of what it failed with."""
    error_file: Path


@dataclass(frozen=True)
class Overview:
    """A grid as it stands."""

    cells: tuple[CellView, ...]
    pack_sizes: tuple[int, ...]
    """Sizes."""
    artifacts: tuple[ArtifactView, ...]
    collapsed_notes: tuple[str, ...]
    notes: tuple[str, ...]
    estimate_source: str | None
    """The finished cells that estimates rest on."""

    @property
    def is_settled(self) -> bool:
        """Whether every cell is done or failed."""
        return all(view.state in ("done", "failed") for view in self.cells)

    @property
    def seconds_left(self) -> float | None:
        """Estimate of everything that is not done; None where some of it cannot be estimated."""
        parts = [view.seconds_left for view in self.cells]
        parts += [view.estimated_seconds for view in self.artifacts if view.state != "done"]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


def build_overview(grid: Grid, store: Store, limit: PackLimit) -> Overview:
    """The state of every cell and artifact of a grid."""
    alone = {} if limit == "off" else _find_unpacked_reasons(grid, store)
    groups = [
        part for group in group_cells_into_packs(grid.cells, limit) for part in _split_unpacked(group, alone)
    ]
    index = RecordIndex(store.root)
    standings = [read_progress(store.get_record(cell), cell, index) for cell in grid.cells]
    index.save()
    known = zip(grid.cells, (one.training_status for one in standings), strict=True)
    estimator = create_estimator(known, store, grid.scale)
    views = tuple(_build_cell_views(grid, standings, groups, alone, estimator))
    return Overview(
        cells=views,
        pack_sizes=tuple(len(group) for group in groups),
        artifacts=tuple(_build_artifact_views(grid, store, estimator)),
        estimate_source=estimator.describe_source(),
        collapsed_notes=tuple(
            f"{len(points)} combinations are one cell, {fingerprint[:SHOWN_DIGITS]}: they cannot differ "
            f"({'; '.join(_format_point(point) for point in points)})"
            for fingerprint, points in grid.stands_for.items()
        ),
        notes=tuple(
            _describe_unpacked(alone) + _describe_unused_beta(grid) + _describe_undeclared_fields(grid)
        ),
    )


def _format_point(point: dict[str, Any]) -> str:
    return " ".join(f"{axis}={value}" for axis, value in point.items())


def _build_cell_views(
    grid: Grid,
    progresses: list[CellProgress],
    packs: list[list[Cell]],
    unpacked_reasons: Mapping[str, str],
    estimator: TimeEstimator,
) -> Iterator[CellView]:
    pack_of = {cell.full_fingerprint: n for n, group in enumerate(packs) for cell in group}
    for cell, now in zip(grid.cells, progresses, strict=True):
        pack = pack_of[cell.full_fingerprint]
        estimate = estimator.estimate_cell(cell.training, is_packed=len(packs[pack]) > 1)
        yield CellView(
            cell=cell,
            progress=now,
            pack=pack + 1,
            unpacked_reason=unpacked_reasons.get(cell.full_fingerprint),
            estimated_seconds=estimate.seconds,
            estimate_basis=estimate.basis,
        )


def _build_artifact_views(grid: Grid, store: Store, estimator: TimeEstimator) -> Iterator[ArtifactView]:
    for role, model, _ in list_references(grid.cells):
        record = store.get_artifact(grid.scale, role, model)
        error = record.read_status().get("error")
        yield ArtifactView(
            role=role,
            name=f"{model.task}/{model.model.name}",
            state=record.read_state(),
            estimated_seconds=estimator.estimate_artifact(role, model).seconds,
            error=str(error).strip().splitlines()[-1] if error else None,
            error_file=record.status_file,
        )


def _find_unpacked_reasons(grid: Grid, store: Store) -> dict[str, str]:
    """Full fingerprint of a cell -> why it runs alone, as far as that is known before it runs."""
    found: dict[str, str] = {}
    for role, model, cells in list_references(grid.cells):
        kept = (
            read_unpackable_reason(store.get_artifact(grid.scale, role, model)) if role == "start" else None
        )
        for cell in cells if role == "start" else ():
            reason = explain_unpackable(cell) or kept
            if reason:
                found[cell.full_fingerprint] = reason
    return found


def _split_unpacked(pack: list[Cell], unpacked_reasons: Mapping[str, str]) -> list[list[Cell]]:
    return [[cell] for cell in pack] if pack[0].full_fingerprint in unpacked_reasons else [pack]


def _describe_unpacked(unpacked_reasons: Mapping[str, str]) -> list[str]:
    """A line for each reason."""
    return [
        f"{count} cells run alone: {reason}" for reason, count in Counter(unpacked_reasons.values()).items()
    ]


def _describe_unused_beta(grid: Grid) -> list[str]:
    """Betas that are stated for cells whose divergence has none."""
    without = [cell for cell in grid.cells if cell.beta is None]
    stated = {
        task
        for task in {cell.task for cell in without}
        if "beta" in grid.experiment.merge_task_settings(task)
    }
    count = sum("beta" in grid.axes or cell.task in stated for cell in without)
    kinds = " and ".join(sorted({_format_divergence(cell.divergence) for cell in without}, reverse=True))
    return [f"{kinds} reads no beta: {count} of {len(grid.cells)} cells"] if count else []


def _format_divergence(divergence: str) -> str:
    return {"tv": "total variation", "cross_entropy": "cross-entropy"}.get(
        divergence, divergence.replace("_", " ")
    )


_FIELDS_SET_BY_AXIS = {
    "lmbda": {"source"},
    "temperature": {"source"},
    "source": {"source"},
    "method": {"source", "objectives", "teachers"},
    "reward": {"objectives"},
    "alpha": {"objectives"},
    "anchor": {"objectives", "teachers"},
    "beta": {"objectives"},
    "divergence": {"objectives"},
    "rescale_divergence": {"objectives"},
    "teacher_temperature": {"objectives"},
    "student_temperature": {"objectives"},
    "student": {"start"},
    "learning_rate": {"optimizer"},
    "weight_decay": {"optimizer"},
    "max_grad_norm": {"optimizer"},
    "warmup_steps": {"optimizer"},
    "cooldown_steps": {"optimizer"},
}
_MODEL_FIELDS = {"teacher", "start"}


def _describe_undeclared_fields(grid: Grid) -> list[str]:
    """Fields in which cells differ although no axis names them."""
    declared = {"task"} if "task" in grid.axes else set()
    for axis in grid.axes:
        section = axis.split(".")[0]
        declared |= _FIELDS_SET_BY_AXIS.get(axis, {axis})
        if section in ("data", "tokenizer", "teacher_tokenizer") or axis == "precision":
            declared |= _MODEL_FIELDS
        if axis in ("max_input_tokens", "max_output_tokens"):
            declared |= _MODEL_FIELDS
    notes = []
    within = {
        field for group in _group_cells_by_task(grid) for field in _find_varying_fields(group)
    } - declared
    if within:
        notes.append(f"cells differ outside the declared axes in: {', '.join(sorted(within))}")
    across = set(_find_varying_fields(list(grid.cells))) - declared - within
    if across:
        notes.append(f"what depends on the task: {', '.join(sorted(across))}")
    return notes


def _group_cells_by_task(grid: Grid) -> list[list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in grid.cells:
        groups.setdefault(cell.task, []).append(cell)
    return list(groups.values())


def _find_varying_fields(cells: list[Cell]) -> list[str]:
    fields = type(cells[0].training).model_fields
    return [f for f in fields if _has_several_values([getattr(cell.training, f) for cell in cells])]


def _has_several_values(values: list[Any]) -> bool:
    """Whether they are more than one; most cells of a large grid share one object."""
    distinct = {id(value): value for value in values}.values()
    first = canonical_json(values[0])
    return any(canonical_json(value) != first for value in distinct)
