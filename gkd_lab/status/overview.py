"""State and cost of a grid for `plan` and `status`: cells, packs, reference models, notes.

Plain data; neither torch nor pandas, so that the answer comes at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gkd_lab.config import Cell, Grid
from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.cell import AnyEvaluation, list_references
from gkd_lab.config.cost import DeviceRate
from gkd_lab.config.packs import PackLimit, explain_unpackable, group_cells_into_packs
from gkd_lab.status.cell_status import CellProgress, read_progress
from gkd_lab.status.grid_notes import (
    describe_collapsed,
    describe_decoding,
    describe_kept_limits,
    describe_undeclared_fields,
    describe_unpacked,
    describe_unused_beta,
)
from gkd_lab.status.time_estimates import EstimateBasis, TimeEstimator, create_estimator
from gkd_lab.store import State, Store
from gkd_lab.store.bfloat16 import list_bfloat16_notes
from gkd_lab.store.cell_state import get_error_line
from gkd_lab.store.index import RecordIndex
from gkd_lab.store.live_progress import LiveProgress, read_live_progress
from gkd_lab.store.pack_limits import PackLimits
from gkd_lab.tables.training_facts import (
    ReferenceScores,
    describe_epochs,
    list_start_warnings,
    name_reference,
    read_reference_scores,
)


@dataclass(frozen=True)
class CellView:
    """A cell with its progress, its pack and its estimated time."""

    cell: Cell
    progress: CellProgress
    pack: int
    """Number of its pack, from 1."""
    unpacked_reason: str | None
    """Reason why it cannot share a model with other cells; None if it can."""
    estimated_seconds: float | None
    """Of the whole training: alone, or its share of the pack."""
    estimate_basis: EstimateBasis
    decoding_seconds: float
    """Estimated seconds of its evaluations that are not done; those of unknown time count as 0."""

    @property
    def state(self) -> State:
        """State of the whole cell: its training and its evaluations."""
        return self.progress.state

    @property
    def error(self) -> str | None:
        """Last line of its first error; None without one."""
        return self.progress.error

    @property
    def seconds_left(self) -> float | None:
        """Estimated time of the steps and evaluations left; 0 if done, None without an estimate.

        An evaluation whose time is unknown counts as 0: the basis of the estimates says how many do.
        """
        if self.state == "done":
            return 0.0
        share = 1 - self.progress.step / self.cell.training.steps
        if share <= 0:
            return self.decoding_seconds
        return (
            None if self.estimated_seconds is None else self.estimated_seconds * share + self.decoding_seconds
        )


@dataclass(frozen=True)
class ArtifactView:
    """A teacher or an SFT student with its state and its estimated time."""

    role: str
    name: str
    state: State
    estimated_seconds: float | None
    decoding_seconds: float
    """Estimated seconds of its evaluations that are not done; those of unknown time count as 0."""
    live: LiveProgress | None
    """Work of the process that holds its lock."""
    evaluation_states: tuple[State, ...]
    scores: ReferenceScores
    error: str | None
    """Last line of its error."""
    error_file: Path
    """File with the traceback."""


@dataclass(frozen=True)
class Overview:
    """State and cost of all cells and reference models of a grid."""

    cells: tuple[CellView, ...]
    pack_sizes: tuple[int, ...]
    artifacts: tuple[ArtifactView, ...]
    collapsed_notes: tuple[str, ...]
    """A note for each cell that several combinations of the axes share."""
    decode_notes: tuple[str, ...]
    """A note for each way in which cells sample, and search greedily in evaluations."""
    notes: tuple[str, ...]
    estimate_source: str | None
    """Description of the finished cells that estimates rest on."""
    decoding_bases: Mapping[EstimateBasis, int]
    """Number of evaluations not done whose time was estimated on each basis."""
    import_seconds: float
    """Of loading the libraries, once in a run."""
    rate: DeviceRate
    """Device that estimates from FLOPs assume."""

    @property
    def is_settled(self) -> bool:
        """Whether every cell is done or failed."""
        return all(view.state in ("done", "failed") for view in self.cells)

    @property
    def has_failures(self) -> bool:
        """Whether a cell, a reference model or one of their evaluations failed."""
        errors = [view.error for view in self.cells] + [view.error for view in self.artifacts]
        return any(errors)

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds of everything not done; None where some of it has no estimate."""
        parts = [view.seconds_left for view in self.cells]
        for artifact in self.artifacts:
            parts.append(artifact.decoding_seconds)
            if artifact.state != "done":
                parts.append(_estimate_artifact_left(artifact))
        estimates = [part for part in parts if part is not None]
        if len(estimates) < len(parts):
            return None
        work = sum(estimates)
        states = [view.state for view in self.cells] + [view.state for view in self.artifacts]
        is_loaded = "running" in states
        return work + self.import_seconds if work and not is_loaded else work


def build_overview(grid: Grid, store: Store, limit: PackLimit) -> Overview:
    """Read the state of every cell and reference model and estimate times; updates the record index."""
    unpacked_reasons = {} if limit == "off" else _find_unpacked_reasons(grid, store)
    kept_limits = PackLimits(store.root)
    grid_limit = kept_limits.read_grid_limit(grid.cells) if limit == "auto" else None
    packs = [
        part
        for pack in group_cells_into_packs(grid.cells, grid_limit.cells if grid_limit else limit)
        for part in _split_unpacked(pack, unpacked_reasons)
    ]
    index = RecordIndex(store.root)
    progresses = [read_progress(store.get_record(cell), cell, index) for cell in grid.cells]
    index.save()
    statuses = (progress.training_status for progress in progresses)
    estimator = create_estimator(zip(grid.cells, statuses, strict=True), store, grid.scale)
    for cell, progress in zip(grid.cells, progresses, strict=True):
        for evaluation, times in zip(cell.evaluations, progress.decoding_times, strict=True):
            if times is not None:
                estimator.add_decoding_time(cell.training.start, evaluation, *times)
    views = tuple(_build_cell_views(grid, progresses, packs, unpacked_reasons, estimator))
    artifacts = tuple(_build_artifact_views(grid, store, estimator))
    return Overview(
        cells=views,
        pack_sizes=tuple(len(pack) for pack in packs),
        artifacts=artifacts,
        decoding_bases=dict(estimator.decoding_bases),
        import_seconds=estimator.read_import_seconds(),
        rate=estimator.rate,
        estimate_source=estimator.describe_source(),
        collapsed_notes=tuple(describe_collapsed(grid)),
        decode_notes=tuple(describe_decoding(grid)),
        notes=(
            *describe_unpacked(unpacked_reasons),
            *describe_kept_limits(kept_limits, grid_limit, packs, limit),
            *list_bfloat16_notes(grid.cells),
            *describe_unused_beta(grid),
            *describe_undeclared_fields(grid),
            *describe_epochs(grid),
            *list_start_warnings(grid, store),
        ),
    )


def _build_cell_views(
    grid: Grid,
    progresses: list[CellProgress],
    packs: list[list[Cell]],
    unpacked_reasons: Mapping[str, str],
    estimator: TimeEstimator,
) -> Iterator[CellView]:
    """Yield each cell with its progress, the number of its pack (from 1) and its time estimate."""
    pack_numbers = {cell.full_fingerprint: n for n, pack in enumerate(packs, 1) for cell in pack}
    for cell, progress in zip(grid.cells, progresses, strict=True):
        pack = pack_numbers[cell.full_fingerprint]
        estimate = estimator.estimate_cell(cell.training, is_packed=len(packs[pack - 1]) > 1)
        yield CellView(
            cell=cell,
            progress=progress,
            pack=pack,
            unpacked_reason=unpacked_reasons.get(cell.full_fingerprint),
            estimated_seconds=estimate.seconds,
            estimate_basis=estimate.basis,
            decoding_seconds=_estimate_decoding(
                estimator, "start", cell.training.start, cell.evaluations, progress.evaluation_states
            ),
        )


def _build_artifact_views(grid: Grid, store: Store, estimator: TimeEstimator) -> Iterator[ArtifactView]:
    """Yield each teacher and SFT student once, with its state and its time estimate."""
    for reference in list_references(grid.cells):
        role, model = reference.role, reference.model
        record = store.get_artifact(grid.scale, role, model)
        evaluations = tuple(dict.fromkeys(e for cell in reference.cells for e in cell.evaluations))
        states: tuple[State, ...] = tuple(record.get_evaluation(e).read_state() for e in evaluations)
        yield ArtifactView(
            role=role,
            name=name_reference(model),
            state=record.read_state(),
            decoding_seconds=_estimate_decoding(estimator, role, model, evaluations, states),
            live=read_live_progress(record.folder) if record.is_locked() else None,
            evaluation_states=states,
            estimated_seconds=estimator.estimate_artifact(role, model).seconds,
            scores=read_reference_scores(grid, store, reference),
            error=get_error_line(record.read_status()),
            error_file=record.status_file,
        )


def _estimate_decoding(
    estimator: TimeEstimator,
    role: str,
    model: SftModel,
    evaluations: Sequence[AnyEvaluation],
    states: Sequence[State],
) -> float:
    """Return the estimated seconds of a model's evaluations that are not done; unknown ones count as 0."""
    estimates = [
        estimator.estimate_decoding(role, model, evaluation)
        for evaluation, state in zip(evaluations, states, strict=True)
        if state != "done"
    ]
    return sum(seconds for seconds in estimates if seconds is not None)


def _estimate_artifact_left(artifact: ArtifactView) -> float | None:
    """Return the estimated seconds that are left of a reference model's training."""
    if artifact.live is not None and artifact.live.unit == "steps":
        share = 1 - artifact.live.done / artifact.live.total
        return None if artifact.estimated_seconds is None else artifact.estimated_seconds * share
    return artifact.estimated_seconds


def _find_unpacked_reasons(grid: Grid, store: Store) -> dict[str, str]:
    """Map full fingerprint of each cell that must run alone to the reason, as far as known now."""
    reasons: dict[str, str] = {}
    for role, model, cells in list_references(grid.cells):
        if role != "start":
            continue
        cached_reason = store.get_artifact(grid.scale, role, model).read_unpackable_reason()
        for cell in cells:
            reason = explain_unpackable(cell) or cached_reason
            if reason:
                reasons[cell.full_fingerprint] = reason
    return reasons


def _split_unpacked(pack: list[Cell], unpacked_reasons: Mapping[str, str]) -> list[list[Cell]]:
    """Return packs of one if the first cell of a pack has a reason to run alone, else the pack."""
    return [[cell] for cell in pack] if pack[0].full_fingerprint in unpacked_reasons else [pack]
