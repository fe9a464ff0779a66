"""An experiment's objectives as the terms of a loss."""

from typing import Any

from gkd_lab.distill.divergence import Divergence
from gkd_lab.distill.objectives import CrossEntropy, Measure, Term
from gkd_lab.spec.objectives import AnyObjective, CrossEntropyObjective, Objective


def term_of(objective: AnyObjective) -> Term:
    """The measure that an objective describes, with its weight."""
    return Term(_measure(objective), objective.weight, objective.final_weight)


def _measure(objective: Any) -> Measure:
    match objective:
        case Objective():
            return Divergence(
                kind=objective.divergence,
                beta=0.5 if objective.beta is None else objective.beta,  # total variation has none
                student_temperature=objective.student_temperature,
                teacher_temperature=objective.teacher_temperature,
                rescale=objective.rescale,
            )
        case CrossEntropyObjective():
            return CrossEntropy()
    raise TypeError(f"{type(objective).__name__} has no measure")
