"""Rewards as terms of the loss (Eq. 5): `alpha`, `reward` and `anchor`, and checks of what is learnt from."""

from collections.abc import Iterable, Mapping
from typing import Any

from gkd_lab.config.artifact_specs import FindModel
from gkd_lab.config.cell import Source
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.loss_terms import (
    CrossEntropyConfig,
    ResolvedDivergence,
    ResolvedReward,
    ResolvedTerm,
    RewardConfig,
    WeightedTerm,
)
from gkd_lab.config.reward_names import (
    check_reward_sampling,
    format_off_policy_message,
    hash_reward_module,
)


def resolve_reward(config: RewardConfig, find_model: FindModel) -> ResolvedReward:
    """Return the ResolvedReward, with model revision and module hash. ConfigError for a missing module."""
    hub_name, folder, revision = (None, None, None) if config.model is None else find_model(config.model)
    if hub_name is not None and config.revision is not None:
        revision = config.revision
    content = hash_reward_module(config.name)
    resolved = {"model": hub_name, "path": folder, "revision": revision, "content": content}
    return ResolvedReward(**{**config.model_dump(), **resolved})


def build_reward_terms(
    divergence: ResolvedTerm, reward: ResolvedReward | None, values: Mapping[str, Any]
) -> tuple[ResolvedTerm, ...]:
    """Return (alpha times divergence, 1 - alpha times reward) (Eq. 5), terms of weight 0 left out.

    Without a reward, or with cross-entropy instead of a divergence, the first term alone is returned. With
    the anchor `start` the divergence is from the frozen SFT student, as in RLEF* (Fig. 5).
    """
    alpha, anchor = values["alpha"], values["anchor"] or "teacher"
    if reward is None:
        _check_no_reward(alpha, anchor)
        return (divergence,)
    if not isinstance(divergence, ResolvedDivergence):
        return (divergence,)
    if alpha is None:
        raise ConfigError(
            "reward: give alpha too, the weight of the divergence, from 0 (the reward alone) to 1"
        )
    if anchor == "start" and alpha == 1:
        raise ConfigError(
            "alpha 1 with anchor start leaves the student nothing but itself to learn from: set alpha below "
            "1, or anchor: teacher"
        )
    changes = {"weight": alpha, **({"teachers": (1,)} if anchor == "start" else {})}
    # 1 - 0.9 is 0.09999999999999998, and would be another cell than 0.1.
    terms = (
        ResolvedDivergence(**{**divergence.model_dump(), **changes}),
        reward.reweight(round(1 - alpha, 12)),
    )
    return tuple(term for term in terms if term.weight)


def _check_no_reward(alpha: float | None, anchor: str) -> None:
    """Raise ConfigError if alpha or the anchor `start` is set; called where there is no reward."""
    for name, value in (("alpha", alpha), ("anchor", anchor if anchor == "start" else None)):
        if value is not None:
            raise ConfigError(f"{name} {value} says how to weigh a reward: set `reward`, or leave {name} out")


def check_not_all_weights_zero(terms: Iterable[WeightedTerm]) -> None:
    """Raise ConfigError if every term's weight, and final weight, is 0."""
    if not any(term.weight or term.final_weight for term in terms):
        raise ConfigError("objectives: all weights are 0, so nothing would be learnt; give one a weight")


def check_terms_learn(terms: Iterable[ResolvedTerm], source: Source) -> None:
    """Raise ConfigError if all weights are 0, or the terms learn nothing from some of the source's text.

    A reward learns only from text that the student sampled, cross-entropy only from other text.
    """
    listed = list(terms)
    check_not_all_weights_zero(listed)
    classes = {type(term) for term in listed if term.weight or term.final_weight}
    if ResolvedReward in classes:
        check_reward_sampling(source.lmbda, source.temperature)
        if source.lmbda < 1 and classes == {ResolvedReward}:
            raise ConfigError(format_off_policy_message(source.lmbda))
    elif source.lmbda > 0 and classes == {CrossEntropyConfig}:
        raise ConfigError(
            f"lmbda {source.lmbda:g} lets the student write, and cross_entropy has nothing to teach of its "
            "own text: set lmbda to 0, or add a divergence to the objectives"
        )
