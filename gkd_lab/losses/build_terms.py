"""Build the terms of a loss from their descriptions, by the registry `gkd_lab.config.loss_registry`."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from gkd_lab.config.errors import ConfigError, explain_validation_error, suggest_choices
from gkd_lab.config.fingerprint import Frozen
from gkd_lab.config.loss_registry import load_loss_class
from gkd_lab.config.loss_terms import (
    FIRST_TEACHER,
    DivergenceConfig,
    ResolvedDivergence,
    ResolvedReward,
    ResolvedTerm,
    RewardConfig,
    TermConfig,
)
from gkd_lab.config.reward_objectives import check_not_all_weights_zero
from gkd_lab.losses.teacher_targets import TeacherTarget
from gkd_lab.losses.terms import FIRST_TEACHER_TARGET, WeightedLoss, WeightedLosses


def build_term(config: ResolvedTerm) -> WeightedLoss:
    """Return the loss that a term describes, with its weight and its teachers."""
    target = FIRST_TEACHER_TARGET
    if isinstance(config, ResolvedDivergence):
        target = TeacherTarget(
            teachers=config.teachers,
            weights=config.mixture or (),
            temperatures=config.mixture_temperatures or (),
            routed=config.routes is not None,
        )
    # Without its weight, so that losses that compute the same are equal.
    loss = load_loss_class(config.type).build(config.model_copy(update={"weight": 1.0, "final_weight": None}))
    return WeightedLoss(loss, config.weight, config.final_weight, target)


class _ListedTerms(Frozen):
    objectives: tuple[TermConfig, ...]


def parse_terms(objectives: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> WeightedLosses:
    """Build the terms of `GKDConfig(objectives=[...])`.

    defaults: the settings that a divergence has where it does not state them.

    Raises:
        ConfigError: for a term that the description refuses, and if all weights are 0.
    """
    stated = [_add_defaults(term, defaults) for term in objectives]
    try:
        configs = _ListedTerms(objectives=tuple(stated)).objectives
    except ValidationError as error:
        raise explain_validation_error(error, "GKDConfig", _ListedTerms) from error
    if configs:
        check_not_all_weights_zero(configs)
    return tuple(build_term(_resolve_term(config, defaults)) for config in configs)


def _add_defaults(term: Any, defaults: Mapping[str, Any]) -> Any:
    is_divergence = isinstance(term, Mapping) and term.get("type", "divergence") == "divergence"
    return {**defaults, **term} if is_divergence else term


def _resolve_term(config: TermConfig, defaults: Mapping[str, Any]) -> ResolvedTerm:
    """Return the term as records store it; teachers have numbers here, and rewards no content."""
    if isinstance(config, RewardConfig):
        return ResolvedReward(**config.model_dump())
    if not isinstance(config, DivergenceConfig):
        return config
    numbers: dict[str | int, int] = {FIRST_TEACHER: 0}
    for name in config.teacher_names:
        if isinstance(name, int) and name >= 0:
            numbers[name] = name
        elif name not in numbers:
            choices = suggest_choices(name, [FIRST_TEACHER, "0", "1"])
            raise ConfigError(
                f"GKDConfig: objectives: teacher {name!r}: teachers have numbers in Python, 0 is the first "
                f"and 1 and on are `more_teachers`; {choices}"
            )
    return config.resolve(defaults, numbers)
