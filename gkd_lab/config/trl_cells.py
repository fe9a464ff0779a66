"""Cells with `implementation: trl`: how they resolve, and the settings that TRL's GKDTrainer cannot follow.

Such a cell is what a user of TRL gets from the same settings. What its loss does in its own way (the
denominator, the coin, sampling, truncation) is the difference that the axis shows; a setting that it would
ignore is refused.
"""

import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import Any

from gkd_lab.config.cell import Training
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.loss_terms import ResolvedDivergence, ResolvedTerm
from gkd_lab.config.settings import Settings

_LEAVE_OUT = "leave {} out, or set implementation: gkd_lab"


def get_trl_version() -> str:
    """Return the version of the installed TRL, which is part of the identity of its cells."""
    return importlib.metadata.version("trl")


def resolve_implementation(settings: Settings, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Training fields that `implementation` sets; {} for gkd_lab.

    TRL divides by tokens whatever the defaults say, so its cells have `loss_normalization: token`;
    ConfigError if the experiment states another one.
    """
    if settings.implementation != "trl":
        return {}
    if stated.get("loss_normalization", "token") != "token":
        raise ConfigError(
            f"implementation trl: loss_normalization {stated['loss_normalization']}: TRL divides by the "
            f"number of reference tokens; {_LEAVE_OUT.format('loss_normalization')}"
        )
    return {"implementation": "trl", "trl_version": get_trl_version(), "loss_normalization": "token"}


def check_trl_cell(training: Training) -> None:
    """Raise ConfigError for a cell of TRL with a setting that TRL's GKDTrainer cannot follow."""
    if training.implementation != "trl":
        return
    for reason in (*_list_model_conflicts(training), *_list_loss_conflicts(training)):
        raise ConfigError(f"implementation trl: {reason}")


def _list_model_conflicts(training: Training) -> Iterator[str]:
    """Yield messages about models and texts: what the field is, why TRL cannot, what to change."""
    family = training.start.family
    if family != "decoder-only":
        yield (
            f"task {training.task} has {family} models at this scale, and TRL's trainer takes decoder-only "
            "ones alone: choose a task that has them, such as arithmetic at nano, or --scale smol, or set "
            "implementation: gkd_lab"
        )
    source, teacher = training.source, training.teacher
    if source.text is not None:
        yield (
            "source teacher: TRL's seq_kd samples the teacher anew in each step, for a divergence, and has "
            f"no stored text; {_LEAVE_OUT.format('source: teacher and method')}"
        )
    if source.corrupted is not None:
        yield f"source.corrupted: TRL has one text for each row; {_LEAVE_OUT.format('source.corrupted')}"
    if training.teacher_scores is not None:
        yield f"teacher_scores: TRL's teacher reads every step's rows; {_LEAVE_OUT.format('teacher_scores')}"
    if teacher.model.served is not None:
        yield f"teacher.server: TRL's trainer needs a loaded teacher; {_LEAVE_OUT.format('teacher.server')}"
    if training.teachers:
        yield f"teachers: TRL has one teacher, `teacher`; {_LEAVE_OUT.format('teachers')}"
    for name, value in zip(("dtype", "parked"), training.get_teacher_placement(0), strict=True):
        if value:
            yield f"teacher.{name}: TRL has no such option; {_LEAVE_OUT.format(f'teacher.{name}')}"
    is_made = teacher.model.architecture is not None and training.start.model.architecture is not None
    if is_made and teacher.tokenizer != training.start.tokenizer:
        yield (
            "teacher_tokenizer: TRL compares teacher and student token by token; "
            + _LEAVE_OUT.format("teacher_tokenizer")
        )


def _list_loss_conflicts(training: Training) -> Iterator[str]:
    """Yield messages about loss terms, for all but one JSD(beta) at temperature 1."""
    terms = training.objectives
    other_types = [term.type for term in terms if not isinstance(term, ResolvedDivergence)]
    if other_types:
        yield (
            f"objectives: {other_types[0]}: TRL's loss is one divergence, JSD(beta); set lmbda and beta, and "
            "leave objectives, method and reward out"
        )
    elif len(terms) > 1:
        yield f"objectives: {len(terms)} terms: TRL's loss is one divergence, JSD(beta); keep one"
    else:
        yield from _list_divergence_conflicts(terms[0])


def _list_divergence_conflicts(term: ResolvedTerm) -> Iterator[str]:
    """Yield messages about the settings of the one divergence."""
    assert isinstance(term, ResolvedDivergence)
    if term.divergence != "jsd":
        yield f"divergence {term.divergence}: TRL has JSD(beta) alone; set divergence: jsd and a beta"
    if term.rescale:
        yield f"rescale_divergence: TRL does not divide by beta (1 - beta); {_LEAVE_OUT.format('it')}"
    if term.weight != 1 or term.final_weight is not None:
        yield f"objectives: weight {term.weight:g}: TRL's loss has none; {_LEAVE_OUT.format('it')}"
    for name in ("teacher_temperature", "student_temperature"):
        value = getattr(term, name)
        if value != 1:
            yield (
                f"{name} {value:g}: TRL's loss has temperature 1 (its `temperature` acts on sampling alone); "
                f"set {name}: 1"
            )
