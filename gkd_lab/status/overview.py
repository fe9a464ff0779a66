"""What `plan` and `status` say of a grid: cells, their state and cost, what collapses, what differs.

Plain data; neither torch nor pandas, so that the answer comes at once.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd_lab.config import Cell, GridOfCells
from gkd_lab.config.cell import references
from gkd_lab.config.fingerprint import SHOWN, canonical
from gkd_lab.config.packs import PackLimit, packs, why_alone
from gkd_lab.status.cell_status import Standing, standing
from gkd_lab.status.time_estimates import Basis, Estimator, learn_from
from gkd_lab.store import State, Store
from gkd_lab.store.index import Index
from gkd_lab.store.pack_cache import kept_reason


@dataclass(frozen=True)
class CellView:
    """One line of a listing."""

    cell: Cell
    now: Standing
    pack: int
    alone: str | None
    """Why no other cell shares its model, if it is not for the limit that was asked for."""
    seconds: float | None
    """Estimate for the whole training: alone, or its share of the pack."""
    basis: Basis
    """What the estimate was made of."""

    @property
    def state(self) -> State:
        return self.now.state

    @property
    def error(self) -> str | None:
        """The last line of what it failed with."""
        return self.now.error

    @property
    def seconds_left(self) -> float | None:
        """Of the estimate."""
        if self.state == "done":
            return 0.0
        share = 1 - self.now.step / self.cell.training.steps
        return None if self.seconds is None else self.seconds * share


@dataclass(frozen=True)
class ArtifactView:
    """A teacher or a starting student."""

    role: str
    name: str
    state: State
    seconds: float | None
    error: str | None
    """The last line of what it failed with."""
    log: Path


@dataclass(frozen=True)
class Overview:
    """A grid as it stands."""

    cells: tuple[CellView, ...]
    packs: tuple[int, ...]
    """Sizes."""
    artifacts: tuple[ArtifactView, ...]
    collapsed: tuple[str, ...]
    notes: tuple[str, ...]
    learnt_from: str | None
    """The finished cells that estimates rest on."""

    @property
    def settled(self) -> bool:
        """Whether every cell is done or failed."""
        return all(view.state in ("done", "failed") for view in self.cells)

    @property
    def seconds_left(self) -> float | None:
        """Estimate of everything that is not done; None where some of it cannot be estimated."""
        parts = [view.seconds_left for view in self.cells]
        parts += [view.seconds for view in self.artifacts if view.state != "done"]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


def overview(grid: GridOfCells, store: Store, limit: PackLimit) -> Overview:
    """The state of every cell and artifact of a grid."""
    alone = {} if limit == "off" else _alone(grid, store)
    groups = [part for group in packs(grid.cells, limit) for part in _parted(group, alone)]
    index = Index(store.root)
    standings = [standing(store.of(cell), cell, index) for cell in grid.cells]
    index.save()
    known = zip(grid.cells, (one.status for one in standings), strict=True)
    estimator = learn_from(known, store, grid.scale)
    views = tuple(_views(grid, standings, groups, alone, estimator))
    return Overview(
        cells=views,
        packs=tuple(len(group) for group in groups),
        artifacts=tuple(_artifacts(grid, store, estimator)),
        learnt_from=estimator.learnt_from(),
        collapsed=tuple(
            f"{len(points)} combinations are one cell, {fingerprint[:SHOWN]}: they cannot differ "
            f"({'; '.join(_called(point) for point in points)})"
            for fingerprint, points in grid.stands_for.items()
        ),
        notes=tuple(_reasons(alone) + _unread(grid) + _undeclared(grid)),
    )


def _called(point: dict[str, Any]) -> str:
    return " ".join(f"{axis}={value}" for axis, value in point.items())


def _views(
    grid: GridOfCells,
    standings: list[Standing],
    groups: list[list[Cell]],
    alone: Mapping[str, str],
    estimator: Estimator,
) -> Iterator[CellView]:
    pack_of = {cell.full_fingerprint: n for n, group in enumerate(groups) for cell in group}
    for cell, now in zip(grid.cells, standings, strict=True):
        pack = pack_of[cell.full_fingerprint]
        estimate = estimator.of_cell(cell.training, packed=len(groups[pack]) > 1)
        yield CellView(
            cell=cell,
            now=now,
            pack=pack + 1,
            alone=alone.get(cell.full_fingerprint),
            seconds=estimate.seconds,
            basis=estimate.basis,
        )


def _artifacts(grid: GridOfCells, store: Store, estimator: Estimator) -> Iterator[ArtifactView]:
    for role, model, _ in references(grid.cells):
        record = store.artifact(grid.scale, role, model)
        error = record.status().get("error")
        yield ArtifactView(
            role=role,
            name=f"{model.task}/{model.model.name}",
            state=record.state(),
            seconds=estimator.of_artifact(role, model).seconds,
            error=str(error).strip().splitlines()[-1] if error else None,
            log=record.status_file,
        )


def _alone(grid: GridOfCells, store: Store) -> dict[str, str]:
    """Full fingerprint of a cell -> why it runs alone, as far as that is known before it runs."""
    found: dict[str, str] = {}
    for role, model, cells in references(grid.cells):
        kept = kept_reason(store.artifact(grid.scale, role, model)) if role == "start" else None
        for cell in cells if role == "start" else ():
            reason = why_alone(cell) or kept
            if reason:
                found[cell.full_fingerprint] = reason
    return found


def _parted(group: list[Cell], alone: Mapping[str, str]) -> list[list[Cell]]:
    return [[cell] for cell in group] if group[0].full_fingerprint in alone else [group]


def _reasons(alone: Mapping[str, str]) -> list[str]:
    """A line for each reason."""
    return [f"{count} cells run alone: {reason}" for reason, count in Counter(alone.values()).items()]


def _unread(grid: GridOfCells) -> list[str]:
    """Betas that are stated for cells whose divergence has none."""
    without = [cell for cell in grid.cells if cell.beta is None]
    stated = {task for task in {cell.task for cell in without} if "beta" in grid.experiment.stated(task)}
    count = sum("beta" in grid.axes or cell.task in stated for cell in without)
    kinds = " and ".join(sorted({_spoken(cell.divergence) for cell in without}, reverse=True))
    return [f"{kinds} reads no beta: {count} of {len(grid.cells)} cells"] if count else []


def _spoken(kind: str) -> str:
    return {"tv": "total variation", "cross_entropy": "cross-entropy"}.get(kind, kind.replace("_", " "))


_OF_AXIS = {
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
_OF_BOTH_MODELS = {"teacher", "start"}


def _undeclared(grid: GridOfCells) -> list[str]:
    """Fields in which cells differ although no axis names them."""
    declared = {"task"} if "task" in grid.axes else set()
    for axis in grid.axes:
        section = axis.split(".")[0]
        declared |= _OF_AXIS.get(axis, {axis})
        if section in ("data", "tokenizer", "teacher_tokenizer") or axis == "precision":
            declared |= _OF_BOTH_MODELS
        if axis in ("max_input_tokens", "max_output_tokens"):
            declared |= _OF_BOTH_MODELS
    notes = []
    within = {field for group in _by_task(grid) for field in _varied(group)} - declared
    if within:
        notes.append(f"cells differ outside the declared axes in: {', '.join(sorted(within))}")
    across = set(_varied(list(grid.cells))) - declared - within
    if across:
        notes.append(f"what depends on the task: {', '.join(sorted(across))}")
    return notes


def _by_task(grid: GridOfCells) -> list[list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in grid.cells:
        groups.setdefault(cell.task, []).append(cell)
    return list(groups.values())


def _varied(cells: list[Cell]) -> list[str]:
    fields = type(cells[0].training).model_fields
    return [f for f in fields if _differ([getattr(cell.training, f) for cell in cells])]


def _differ(values: list[Any]) -> bool:
    """Whether they are more than one; most cells of a large grid share one object."""
    distinct = {id(value): value for value in values}.values()
    first = canonical(values[0])
    return any(canonical(value) != first for value in distinct)
