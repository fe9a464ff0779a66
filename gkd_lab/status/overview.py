"""State and cost of a grid for `plan` and `status`: cells, packs, reference models, notes.

Plain data; neither torch nor pandas, so that the answer comes at once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from gkd_lab.config import Cell, Grid
from gkd_lab.config.artifact_specs import CLASSIFIER_FAMILIES, SftModel
from gkd_lab.config.cell import AnyEvaluation, Training, list_references
from gkd_lab.config.cost import DeviceRate
from gkd_lab.config.fingerprint import SHOWN_DIGITS, canonical_json
from gkd_lab.config.loss_terms import NAMES_WITHOUT_BETA
from gkd_lab.config.packs import PackLimit, drop_model_seeds, explain_unpackable, group_cells_into_packs
from gkd_lab.config.settings import LoraSettings
from gkd_lab.status.cell_status import CellProgress, read_progress
from gkd_lab.status.time_estimates import EstimateBasis, TimeEstimator, create_estimator
from gkd_lab.store import State, Store
from gkd_lab.store.bfloat16 import list_bfloat16_notes
from gkd_lab.store.cell_state import get_error_line
from gkd_lab.store.index import RecordIndex
from gkd_lab.store.live_progress import LiveProgress, read_live_progress
from gkd_lab.store.pack_limits import KeptLimit, PackLimits
from gkd_lab.tables.training_facts import (
    ReferenceScores,
    describe_epochs,
    group_cells_by_task,
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
        collapsed_notes=tuple(
            f"{len(points)} combinations are one cell"
            f"{'' if grid.missing_revisions else f', {fingerprint[:SHOWN_DIGITS]}'}: they cannot differ "
            f"({'; '.join(_format_point(point) for point in points)})"
            for fingerprint, points in grid.stands_for.items()
        ),
        decode_notes=tuple(_describe_decoding(grid)),
        notes=(
            *_describe_unpacked(unpacked_reasons),
            *_describe_kept_limits(kept_limits, grid_limit, packs, limit),
            *list_bfloat16_notes(grid.cells),
            *_describe_unused_beta(grid),
            *_describe_undeclared_fields(grid),
            *describe_epochs(grid),
            *list_start_warnings(grid, store),
        ),
    )


def _format_point(point: dict[str, Any]) -> str:
    """Format a combination of axis values: `axis=value axis=value`."""
    return " ".join(f"{axis}={value}" for axis, value in point.items())


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


def _describe_unpacked(unpacked_reasons: Mapping[str, str]) -> list[str]:
    """Return a note for each reason, with the number of cells that run alone for it."""
    counts = Counter(unpacked_reasons.values())
    return [f"{count} cells run alone: {reason}" for reason, count in counts.items()]


def _describe_kept_limits(
    kept_limits: PackLimits, grid_limit: KeptLimit | None, packs: list[list[Cell]], limit: PackLimit
) -> Iterator[str]:
    """Yield a note for each limit that earlier runs have left in the outputs folder, with its reason.

    A number of cells that the user sets is limited only by what a kill for lack of memory has left.
    """
    if grid_limit is not None and grid_limit.reason:
        yield f"packs of at most {grid_limit.cells} cells, as in the first run: {grid_limit.reason}"
    if limit == "off":
        return
    for stage, device, kept in kept_limits.iterate_lowered(pack[0] for pack in packs):
        if limit == "auto" or kept.was_killed:
            plural = "" if kept.cells == 1 else "s"
            yield f"{stage} on {device}: at most {kept.cells} cell{plural} as one model: {kept.reason}"


def _describe_decoding(grid: Grid) -> Iterator[str]:
    """Yield a note for each way in which cells sample and search greedily, with its number of cells.

    Beams and calculators always use transformers' `generate`; a loaded model is known only when it runs.
    """
    counts = Counter(filter(None, (_name_decoding(cell.training) for cell in grid.cells)))
    for way, count in counts.items():
        yield f"decoding of {count} cells: {way}"


def _name_decoding(training: Training) -> str | None:
    """Return what decodes for a training, and why it must; None for a classifier."""
    if training.start.family in CLASSIFIER_FAMILIES:
        return None
    if training.implementation == "trl":
        return "transformers' `generate` for TRL's samples"
    if training.lora is not None:
        return "transformers' `generate`, as the model has an adapter"
    if training.start.model.architecture is not None:
        return "fused steps, once their logits equal the model's own"
    return (
        "fused steps if the model is built like Llama or T5 and their logits equal its own, else "
        "transformers' `generate`"
    )


def _describe_unused_beta(grid: Grid) -> list[str]:
    """Return one note in a list if beta is set for cells whose loss has none, else an empty list."""
    cells = [cell for cell in grid.cells if cell.beta is None]
    tasks = {cell.task for cell in cells}
    tasks_with_beta = {
        task for task in tasks if "beta" in grid.experiment.merge_task_settings(task, grid.scale)
    }
    count = sum("beta" in grid.axes or cell.task in tasks_with_beta for cell in cells)
    divergences = sorted({_format_divergence(cell.divergence) for cell in cells}, reverse=True)
    note = f"{' and '.join(divergences)} reads no beta: {count} of {len(grid.cells)} cells"
    return [note] if count else []


def _format_divergence(divergence: str) -> str:
    """Return a readable name of a divergence or term type: `tv` -> `total variation`."""
    names = {**NAMES_WITHOUT_BETA, "cross_entropy": "cross-entropy"}
    return names.get(divergence, divergence.replace("_", " "))


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
    "implementation": {"implementation", "trl_version", "loss_normalization"},
    "student": {"start", "lora"},
    "teacher": {"teacher", "teacher_dtypes", "parked"},
    "teachers": {"teachers", "teacher_dtypes", "parked"},
    "student.sft.rows": {"start", "train_rows"},
    **{f"student.lora.{name}": {"lora"} for name in LoraSettings.model_fields},
    "learning_rate": {"optimizer"},
    "weight_decay": {"optimizer"},
    "max_grad_norm": {"optimizer"},
    "warmup_steps": {"optimizer"},
    "cooldown_steps": {"optimizer"},
}
_MODEL_FIELDS = {"teacher", "start"}
_AXES_OF_BOTH_MODELS = {
    *("data", "tokenizer", "teacher_tokenizer"),
    *("precision", "max_input_tokens", "max_output_tokens"),
}


def _describe_undeclared_fields(grid: Grid) -> list[str]:
    """Return notes: training fields that differ though no axis sets them, or with the task."""
    declared = {"task"} if "task" in grid.axes else set()
    for axis in grid.axes:
        declared |= _FIELDS_SET_BY_AXIS.get(axis, {axis})
        if axis.split(".")[0] in _AXES_OF_BOTH_MODELS:
            declared |= _MODEL_FIELDS
    notes = []
    groups = group_cells_by_task(grid)
    varying = {name for cells in groups for name in _find_varying_fields(cells)}
    undeclared = varying - declared
    if undeclared:
        notes.append(f"cells differ outside the declared axes in: {', '.join(sorted(undeclared))}")
    varying_with_task = varying if len(groups) == 1 else set(_find_varying_fields(list(grid.cells)))
    task_dependent = varying_with_task - declared - undeclared
    if task_dependent:
        notes.append(f"what depends on the task: {', '.join(sorted(task_dependent))}")
    return notes


def _find_varying_fields(cells: list[Cell]) -> list[str]:
    """Return the names of the training fields in which these cells differ."""
    names = type(cells[0].training).model_fields
    trainings = [cell.training for cell in cells]
    return [name for name in names if _has_several_values(name, map(attrgetter(name), trainings))]


def _has_several_values(name: str, values: Iterable[Any]) -> bool:
    """Return whether the values of a field differ; SFT students without their seeds, which `seed` sets."""
    distinct_objects = {id(value): value for value in values}.values()  # most cells share one object
    if name == "start":
        distinct_objects = {id(value): drop_model_seeds(value) for value in distinct_objects}.values()
    texts = map(canonical_json, distinct_objects)
    first = next(texts)
    return any(text != first for text in texts)
