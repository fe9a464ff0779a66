"""Settings of a cell that claims need and that no axis may tell, read from its resolved specification."""

from typing import Any

from gkd_lab.config import Cell
from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.cell import Training
from gkd_lab.config.loss_terms import ResolvedDivergence, ResolvedReward, ULDConfig

FACT_COLUMNS = (
    "text",
    "reward",
    "distillation_share",
    "anchor",
    "self_distillation",
    "teacher_temperature",
    "learning_rate",
    "train_rows",
)
"""Columns of the facts; null in the rows of reference models."""


def read_cell_facts(cell: Cell) -> dict[str, Any]:
    """Return a value per column of `FACT_COLUMNS`.

    text: source of the fixed sequences: `data`, `teacher`, or `corrupted` data. reward: whether a loss term
    is a reward. distillation_share: see `_compute_distillation_share`. anchor: `start` where a divergence
    compares with the SFT student (RLEF*), else None. self_distillation: whether student and teacher have one
    architecture. teacher_temperature: of the first term that has one. train_rows: None for all rows.
    """
    training = cell.training
    teacher, start = (_describe_architecture(model) for model in (training.teacher, training.start))
    return {
        "text": _name_text(training),
        "reward": any(isinstance(term, ResolvedReward) for term in training.objectives),
        "distillation_share": _compute_distillation_share(training),
        "anchor": "start" if _is_anchored_to_start(training) else None,
        "self_distillation": teacher == start,
        "teacher_temperature": _find_teacher_temperature(training),
        "learning_rate": training.optimizer.learning_rate,
        "train_rows": training.train_rows,
    }


def _name_text(training: Training) -> str:
    """Return where the sequences that the student does not write come from."""
    if training.source.corrupted is not None:
        return "corrupted"
    return "data" if training.source.text is None else "teacher"


def _compute_distillation_share(training: Training) -> float | None:
    """Return alpha of Eq. 5: the share of divergences in the weight of rewards and divergences.

    None without a reward, because such a cell has no trade-off.
    """
    rewards = sum(term.weight for term in training.objectives if isinstance(term, ResolvedReward))
    divergences = sum(term.weight for term in training.objectives if isinstance(term, ResolvedDivergence))
    return round(1 - rewards / (rewards + divergences), 6) if rewards else None


def _is_anchored_to_start(training: Training) -> bool:
    """Return whether a divergence compares the student with the SFT student that it started from."""
    numbers = {
        number
        for term in training.objectives
        if isinstance(term, ResolvedDivergence)
        for number in term.teachers
    }
    return any(training.teachers[number - 1] == training.start for number in numbers if number)


def _describe_architecture(model: SftModel) -> tuple[Any, ...]:
    """Return what tells two architectures apart: made from scratch, or loaded, with the layers kept."""
    spec = model.model
    return spec.architecture, spec.pretrained, spec.path, spec.keep_layers


def _find_teacher_temperature(training: Training) -> float | None:
    """Return the teacher's temperature in the first loss term that has one; None without any."""
    for term in training.objectives:
        if isinstance(term, ResolvedDivergence | ULDConfig):
            return term.teacher_temperature
    return None
