"""Notes on a grid for `plan` and `status`: what collapses, runs alone, how cells decode, other fields."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any

from gkd_lab.config import Cell, Grid
from gkd_lab.config.artifact_specs import CLASSIFIER_FAMILIES
from gkd_lab.config.cell import Training
from gkd_lab.config.fingerprint import SHOWN_DIGITS, canonical_json
from gkd_lab.config.loss_terms import NAMES_WITHOUT_BETA
from gkd_lab.config.packs import PackLimit, drop_model_seeds
from gkd_lab.config.settings import LoraSettings
from gkd_lab.store.pack_limits import KeptLimit, PackLimits
from gkd_lab.tables.training_facts import group_cells_by_task


def describe_collapsed(grid: Grid) -> Iterator[str]:
    """Yield a note for each cell that several combinations of the axes share."""
    for fingerprint, points in grid.stands_for.items():
        name = "" if grid.missing_revisions else f", {fingerprint[:SHOWN_DIGITS]}"
        combinations = "; ".join(map(_format_point, points))
        yield f"{len(points)} combinations are one cell{name}: they cannot differ ({combinations})"


def _format_point(point: dict[str, Any]) -> str:
    """Format a combination of axis values: `axis=value axis=value`."""
    return " ".join(f"{axis}={value}" for axis, value in point.items())


def describe_unpacked(unpacked_reasons: Mapping[str, str]) -> list[str]:
    """Return a note for each reason, with the number of cells that run alone for it."""
    counts = Counter(unpacked_reasons.values())
    return [f"{count} cells run alone: {reason}" for reason, count in counts.items()]


def describe_kept_limits(
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


def describe_decoding(grid: Grid) -> Iterator[str]:
    """Yield a note for each way in which cells sample and search greedily, with its number of cells.

    Beams and calculators always use transformers' `generate`; a loaded model is known only when it runs.
    """
    counts = Counter(filter(None, (_name_decoding(cell.training) for cell in grid.cells)))
    for way, count in counts.items():
        yield f"decoding of {count} cell{'' if count == 1 else 's'}: {way}"


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


def describe_unused_beta(grid: Grid) -> list[str]:
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


def describe_undeclared_fields(grid: Grid) -> list[str]:
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
