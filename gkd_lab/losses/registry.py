"""An experiment's objectives as the terms of a loss."""

from typing import Any

from gkd_lab.config.loss_terms import (
    AdversarialConfig,
    AttentionsConfig,
    CrossEntropyConfig,
    HiddenStatesConfig,
    ResolvedDivergence,
    ResolvedReward,
    ResolvedTerm,
    SquaredErrorConfig,
    ULDConfig,
)
from gkd_lab.losses.adversarial import OF_GAME, AdversarialLoss
from gkd_lab.losses.attentions import AttentionLoss
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.hidden_states import HiddenStateLoss
from gkd_lab.losses.squared_error import SquaredError
from gkd_lab.losses.teacher_targets import TeacherTarget
from gkd_lab.losses.terms import (
    FIRST_TEACHER_TARGET,
    CrossEntropy,
    LabelSquaredError,
    Loss,
    RewardLoss,
    WeightedLoss,
)
from gkd_lab.losses.uld import ULD


def build_term(objective: ResolvedTerm) -> WeightedLoss:
    """The measure that an objective describes, with its weight."""
    target = _build_target(objective) if isinstance(objective, ResolvedDivergence) else FIRST_TEACHER_TARGET
    return WeightedLoss(_build_loss(objective), objective.weight, objective.final_weight, target)


def _build_target(objective: ResolvedDivergence) -> TeacherTarget:
    return TeacherTarget(
        teachers=objective.teachers,
        weights=objective.mixture or (),
        temperatures=objective.mixture_temperatures or (),
        routed=objective.routes is not None,
    )


def _build_loss(objective: Any) -> Loss:
    match objective:
        case ResolvedDivergence():
            return Divergence(
                kind=objective.divergence,
                beta=0.5 if objective.beta is None else objective.beta,  # total variation has none
                student_temperature=objective.student_temperature,
                teacher_temperature=objective.teacher_temperature,
                rescale=objective.rescale,
                square_temperature=objective.square_temperature,
            )
        case CrossEntropyConfig():
            return CrossEntropy()
        case SquaredErrorConfig():
            return SquaredError() if objective.against == "teacher" else LabelSquaredError()
        case ResolvedReward():
            return RewardLoss(
                objective.name,
                objective.path or objective.model,
                objective.revision if objective.model else None,  # a folder is what it is
                objective.baseline,
                objective.normalize,
            )
        case HiddenStatesConfig():
            return HiddenStateLoss(objective.layers, objective.loss, objective.stack)
        case AttentionsConfig():
            return AttentionLoss(objective.layers, objective.loss, objective.stack)
        case ULDConfig():
            return ULD(objective.student_temperature, objective.teacher_temperature)
        case AdversarialConfig():
            return AdversarialLoss(**objective.model_dump(include=set(OF_GAME)))
    raise TypeError(f"{type(objective).__name__} has no measure")
