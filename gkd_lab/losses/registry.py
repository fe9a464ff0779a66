"""An experiment's objectives as the terms of a loss."""

from typing import Any

from gkd_lab.config.loss_terms import (
    AdversarialObjective,
    AnyObjective,
    AttentionsObjective,
    CrossEntropyObjective,
    HiddenStatesObjective,
    Objective,
    RewardObjective,
    SquaredErrorObjective,
    UldObjective,
)
from gkd_lab.losses.adversarial import OF_GAME, Adversarial
from gkd_lab.losses.attentions import Attentions
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.hidden_states import HiddenStates
from gkd_lab.losses.squared_error import SquaredError
from gkd_lab.losses.teacher_targets import Target
from gkd_lab.losses.terms import FIRST, CrossEntropy, LabelError, Measure, PolicyGradient, Term
from gkd_lab.losses.uld import Uld


def term_of(objective: AnyObjective) -> Term:
    """The measure that an objective describes, with its weight."""
    target = _target(objective) if isinstance(objective, Objective) else FIRST
    return Term(_measure(objective), objective.weight, objective.final_weight, target)


def _target(objective: Objective) -> Target:
    return Target(
        teachers=objective.teachers,
        weights=objective.mixture or (),
        temperatures=objective.mixture_temperatures or (),
        routed=objective.routes is not None,
    )


def _measure(objective: Any) -> Measure:
    match objective:
        case Objective():
            return Divergence(
                kind=objective.divergence,
                beta=0.5 if objective.beta is None else objective.beta,  # total variation has none
                student_temperature=objective.student_temperature,
                teacher_temperature=objective.teacher_temperature,
                rescale=objective.rescale,
                square_temperature=objective.square_temperature,
            )
        case CrossEntropyObjective():
            return CrossEntropy()
        case SquaredErrorObjective():
            return SquaredError() if objective.against == "teacher" else LabelError()
        case RewardObjective():
            return PolicyGradient(
                objective.name,
                objective.path or objective.model,
                objective.revision if objective.model else None,  # a folder is what it is
                objective.baseline,
                objective.normalize,
            )
        case HiddenStatesObjective():
            return HiddenStates(objective.layers, objective.loss, objective.stack)
        case AttentionsObjective():
            return Attentions(objective.layers, objective.loss, objective.stack)
        case UldObjective():
            return Uld(objective.student_temperature, objective.teacher_temperature)
        case AdversarialObjective():
            return Adversarial(**objective.model_dump(include=set(OF_GAME)))
    raise TypeError(f"{type(objective).__name__} has no measure")
