"""`alpha`, `reward` and `anchor` as terms of the loss (Eq. 5), and which of their forms make no sense."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from gkd_lab.config.errors import SpecError
from gkd_lab.config.loss_terms import (
    AnyObjective,
    CrossEntropyObjective,
    Objective,
    Rewarded,
    RewardObjective,
)
from gkd_lab.config.reward_names import (
    check_baseline,
    check_model,
    check_name,
    check_sampling,
    content_of,
    nothing_off_policy,
)

FindModel = Callable[[str], tuple[str | None, str | None, str | None]]
"""Name or folder -> (hub name or None, folder or None, revision)."""


class Source(Protocol):
    """Who writes; `gkd_lab.config.cell.Source` is one."""

    @property
    def lmbda(self) -> float: ...
    @property
    def temperature(self) -> float | None: ...


def resolved(stated: Rewarded, find_model: FindModel) -> RewardObjective:
    """The reward as content. Raises SpecError for one that is not there."""
    check_name(stated.name)
    check_model(stated.name, stated.model)
    check_baseline(stated.baseline, stated.normalize)
    hub, path, revision = (None, None, None) if stated.model is None else find_model(stated.model)
    known = {"model": hub, "path": path, "revision": revision, "content": content_of(stated.name)}
    return RewardObjective(**{**stated.model_dump(), **known})


def terms_of(
    divergence: AnyObjective, reward: RewardObjective | None, values: Mapping[str, Any]
) -> tuple[AnyObjective, ...]:
    """The weights alpha of the divergence and 1 - alpha of the reward (Eq. 5); what weighs 0 is left out.

    With the anchor `start` the divergence is from the student as it starts, frozen, as in RLEF* (Fig. 5).
    """
    alpha, anchor = values["alpha"], values["anchor"] or "teacher"
    if reward is None:
        _check_alone(alpha, anchor)
        return (divergence,)
    if not isinstance(divergence, Objective):
        return (divergence,)
    if alpha is None:
        raise SpecError(
            "reward: give alpha too, the weight of the divergence, from 0 (the reward alone) to 1"
        )
    if anchor == "start" and alpha == 1:
        raise SpecError(
            "alpha 1 with anchor start leaves the student nothing but itself to learn from: set alpha below "
            "1, or anchor: teacher"
        )
    changes = {"weight": alpha, **({"teachers": (1,)} if anchor == "start" else {})}
    # 1 - 0.9 is 0.09999999999999998, and would be another cell than 0.1.
    terms = (Objective(**{**divergence.model_dump(), **changes}), reward.weighing(round(1 - alpha, 12)))
    return tuple(term for term in terms if term.weight)


def _check_alone(alpha: float | None, anchor: str) -> None:
    """What says something of a reward where there is none."""
    for name, value in (("alpha", alpha), ("anchor", anchor if anchor == "start" else None)):
        if value is not None:
            raise SpecError(f"{name} {value} says how to weigh a reward: set `reward`, or leave {name} out")


def check_writer(objectives: Iterable[AnyObjective], source: Source) -> None:
    """Raises SpecError where what is written teaches nothing: `reward` of others' text, `cross_entropy` of
    the student's own.
    """
    kinds = {type(one) for one in objectives if one.weight or one.final_weight}
    if not kinds:
        raise SpecError("objectives: all weights are 0, so nothing would be learnt; give one a weight")
    if RewardObjective in kinds:
        check_sampling(source.lmbda, source.temperature)
        if source.lmbda < 1 and kinds == {RewardObjective}:
            raise SpecError(nothing_off_policy(source.lmbda))
    elif source.lmbda > 0 and kinds == {CrossEntropyObjective}:
        raise SpecError(
            f"lmbda {source.lmbda:g} lets the student write, and cross_entropy has nothing to teach of its "
            "own text: set lmbda to 0, or add a divergence to the objectives"
        )
