"""What a loss is made of: measures of single tokens and of whole passes, each with its weight.

Shapes: N tokens, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from gkd_lab.config.reward_names import (
    BUILT_IN_REWARDS,
    check_reward_baseline,
    check_reward_model,
    check_reward_name,
)
from gkd_lab.losses.adversarial import OF_GAME, AdversarialLoss
from gkd_lab.losses.attentions import AttentionLoss
from gkd_lab.losses.auxiliary_losses import AuxiliaryLoss
from gkd_lab.losses.divergence import Divergence, log_probabilities
from gkd_lab.losses.hidden_states import HiddenStateLoss
from gkd_lab.losses.layer_stacks import OF_LAYERS
from gkd_lab.losses.squared_error import AGAINST, SquaredError, label_squared_error
from gkd_lab.losses.teacher_targets import TeacherTarget
from gkd_lab.losses.uld import OF_ULD, ULD


class LabelLoss(ABC):
    """A measure of single tokens that reads the tokens themselves and no teacher."""

    kind: ClassVar[str]
    """Its `type` in an experiment, and the name that it is logged under."""
    on_policy: ClassVar[bool]
    """Whether it teaches of what the student wrote itself, or else of what others wrote."""

    @abstractmethod
    def value_and_gradient(
        self, student_logits_NV: Tensor, labels_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values, (N,), their gradient by the logits, (N, V), and the student's entropy, (N,), in nats."""


@dataclass(frozen=True)
class CrossEntropy(LabelLoss):
    """-log q of the token that is there: the hard labels of Hinton et al. (2015), Sequence KD's loss
    (Kim and Rush 2016), and that of supervised fine-tuning.
    """

    kind: ClassVar[str] = "cross_entropy"
    on_policy: ClassVar[bool] = False

    def __call__(self, student_logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Value of each token, (N,), by autograd: the reference."""
        logs = log_probabilities(student_logits_NV)
        return functional.nll_loss(logs, labels_N, reduction="none")

    @torch.no_grad()
    def value_and_gradient(
        self, student_logits_NV: Tensor, labels_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values, (N,), their gradient by the logits, (N, V), and the student's entropy, (N,), in nats."""
        logs = log_probabilities(student_logits_NV)
        q, place = logs.exp(), labels_N[:, None]
        value = -logs.gather(1, place)[:, 0]
        entropy = -(q * logs).sum(-1)
        return value, q.scatter_add_(1, place, q.new_full(place.shape, -1.0)), entropy


@dataclass(frozen=True)
class RewardLoss(LabelLoss):
    """-log q of the tokens that the student wrote itself, which a step's `scales` multiply by how much better
    than expected their sequence was: the first term of Eq. 5 by REINFORCE (`gkd_lab.losses.policy_gradient`).

    name: one of `BUILT_IN`, or a function's import path. model, revision: what `entailment` asks.
    baseline, normalize: as of `rewards.advantages`.
    """

    name: str
    model: str | None = None
    revision: str | None = None
    baseline: str = "leave_one_out"
    normalize: bool = False

    kind: ClassVar[str] = "reward"
    on_policy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_reward_name(self.name)
        check_reward_model(self.name, self.model)
        check_reward_baseline(self.baseline, self.normalize)

    @property
    def function_key(self) -> tuple[str, str | None, str | None]:
        """What says how texts are rewarded: name, model and its revision."""
        return self.name, self.model, self.revision

    def value_and_gradient(
        self, student_logits_NV: Tensor, labels_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As cross-entropy's: values, (N,), gradients, (N, V), and the student's entropy, (N,), in nats."""
        return CrossEntropy().value_and_gradient(student_logits_NV, labels_N)


@dataclass(frozen=True)
class LabelSquaredError(LabelLoss):
    """(student - label)^2: what a regression learns of the data's own numbers."""

    kind: ClassVar[str] = "squared_error_labels"
    on_policy: ClassVar[bool] = False

    def value_and_gradient(
        self, student_logits_NV: Tensor, labels_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `SquaredError`'s, of one output a row. ValueError: there are more."""
        return label_squared_error(student_logits_NV, labels_N)


TeacherLoss = Divergence | SquaredError
"""Measures of single tokens that compare with a teacher's logits."""
Loss = TeacherLoss | LabelLoss | AuxiliaryLoss


FIRST_TEACHER_TARGET = TeacherTarget()


@dataclass(frozen=True)
class WeightedLoss:
    """A measure and its weight in the loss, which may move linearly to another one over the training.

    target: of a divergence, which teachers it compares with.
    """

    loss: Loss
    weight: float = 1.0
    final_weight: float | None = None
    target: TeacherTarget = FIRST_TEACHER_TARGET

    def interpolate_weight(self, progress: float) -> "WeightedLoss":
        """The term after this share of the training's steps, its weight constant."""
        if self.final_weight is None:
            return self
        weight = self.weight + progress * (self.final_weight - self.weight)
        return replace(self, weight=weight, final_weight=None)

    @property
    def name(self) -> str:
        """Under which the term is logged."""
        return "divergence" if isinstance(self.loss, Divergence) else self.loss.kind

    @property
    def is_token_loss(self) -> bool:
        """Whether it is computed token by token from the logits."""
        return not isinstance(self.loss, AuxiliaryLoss)

    @property
    def reads_labels(self) -> bool:
        """Whether it reads the tokens themselves."""
        return isinstance(self.loss, LabelLoss)

    @property
    def teachers(self) -> tuple[int, ...]:
        """Numbers of the teachers that it reads."""
        if isinstance(self.loss, TeacherLoss):
            return self.target.teachers
        return (0,) if isinstance(self.loss, AuxiliaryLoss) and self.loss.reads_teacher else ()

    def is_applicable(self, *, on_policy: bool) -> bool:
        """Whether it teaches anything of text that the student wrote (`on_policy`), or that others wrote."""
        return not isinstance(self.loss, LabelLoss) or self.loss.on_policy == on_policy


WeightedLosses = tuple[WeightedLoss, ...]


def list_terms(terms: Loss | Sequence[WeightedLoss]) -> WeightedLosses:
    """A measure alone is the only term, of weight 1."""
    if isinstance(terms, TeacherLoss | LabelLoss | AuxiliaryLoss):
        return (WeightedLoss(terms),)
    return tuple(terms)


def zero_inapplicable_terms(terms: WeightedLosses, *, on_policy: bool) -> WeightedLosses:
    """The same with weight 0 for what teaches nothing of such text."""
    return tuple(
        term if term.is_applicable(on_policy=on_policy) else WeightedLoss(term.loss, 0.0, target=term.target)
        for term in terms
    )


def term_names(terms: WeightedLosses) -> list[str]:
    """A name for each term of a cell: `divergence`, `divergence_2`, ..."""
    seen: dict[str, int] = {}
    named = []
    for term in terms:
        seen[term.name] = seen.get(term.name, 0) + 1
        named.append(term.name if seen[term.name] == 1 else f"{term.name}_{seen[term.name]}")
    return named


def required_teachers(all_terms: Iterable[WeightedLosses]) -> list[int]:
    """Numbers of the teachers that any of the terms reads, in their order."""
    return sorted({teacher for terms in all_terms for term in terms for teacher in term.teachers})


def required_outputs(all_terms: Iterable[WeightedLosses]) -> tuple[str, ...]:
    """What passes record besides what heads read, in alphabetical order."""
    measures = [term.loss for terms in all_terms for term in terms]
    return tuple(
        sorted({ask for one in measures if isinstance(one, AuxiliaryLoss) for ask in one.required_outputs})
    )


def needs_text_reader(all_terms: Iterable[WeightedLosses]) -> bool:
    """Whether any of the terms lets the teacher read texts in its own tokens."""
    return any(isinstance(term.loss, ULD) for terms in all_terms for term in terms)


# ---- as they are written in a configuration ----

Fields = Mapping[str, Any]


def parse_terms(listed: Sequence[Fields], default: Divergence) -> WeightedLosses:
    """Terms as they are written in a configuration; `default` has what a divergence does not say.

    Raises:
        ValueError: for an unknown type, an unknown field, weights that are not numbers from 0, or all 0.
    """
    terms = tuple(_parse_term(one, default) for one in listed)
    if terms and not any(term.weight or term.final_weight for term in terms):
        raise ValueError("objectives: all weights are 0, so nothing would be learnt; give one a weight")
    return terms


def _parse_term(one: Fields, default: Divergence) -> WeightedLoss:
    fields = {"type": "divergence", "weight": 1.0, "final_weight": None, **one}
    kind, weight, final = (fields.pop(name) for name in ("type", "weight", "final_weight"))
    for value in (weight, 0 if final is None else final):
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"objectives: weight {value!r} of {kind} is not a number from 0")
    if kind not in READERS:
        raise ValueError(f"objectives: type {kind!r} is not one of {', '.join(map(repr, READERS))}")
    known, read = READERS[kind]
    for name in fields:
        if name not in known:
            has = f"; it has {', '.join(known)} and weight" if known else "; it has a weight only"
            raise ValueError(f"objectives: {kind} has no field {name!r}{has}")
    target = TeacherTarget(**{name: _convert_list(fields.pop(name)) for name in _OF_TARGET if name in fields})
    return WeightedLoss(read(fields, default), weight, final, target)


def _convert_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _divergence(fields: Fields, default: Divergence) -> Divergence:
    return replace(default, **{_OF_DIVERGENCE[name]: value for name, value in fields.items()})


_OF_DIVERGENCE = {
    "divergence": "kind",
    "beta": "beta",
    "rescale": "rescale",
    "teacher_temperature": "teacher_temperature",
    "student_temperature": "student_temperature",
    "square_temperature": "square_temperature",
}
"""What an experiment calls it, and a `Divergence`."""
_OF_TARGET = ("teachers", "weights", "temperatures", "routed")

_OF_REWARD = ("name", "model", "revision", "baseline", "normalize")


def _policy_gradient(fields: Fields, _: Divergence) -> RewardLoss:
    if "name" not in fields:
        raise ValueError(
            f"objectives: a reward needs a name: {', '.join(BUILT_IN_REWARDS)}, or module:function"
        )
    return RewardLoss(**fields)


def _squared_error(fields: Fields, _: Divergence) -> SquaredError | LabelSquaredError:
    against = fields.get("against", "teacher")
    if against not in AGAINST:
        raise ValueError(f"objectives: squared_error: against {against!r} is not one of {', '.join(AGAINST)}")
    return SquaredError() if against == "teacher" else LabelSquaredError()


READERS: dict[str, tuple[Sequence[str], Callable[[Fields, Divergence], Loss]]] = {
    "divergence": ((*_OF_DIVERGENCE, *_OF_TARGET), _divergence),
    "cross_entropy": ((), lambda fields, _: CrossEntropy()),
    SquaredError.kind: (("against",), _squared_error),
    HiddenStateLoss.kind: (OF_LAYERS, lambda fields, _: HiddenStateLoss(**fields)),
    AttentionLoss.kind: (OF_LAYERS, lambda fields, _: AttentionLoss(**fields)),
    AdversarialLoss.kind: (OF_GAME, lambda fields, _: AdversarialLoss(**fields)),
    ULD.kind: (OF_ULD, lambda fields, _: ULD(**fields)),
    "reward": (_OF_REWARD, _policy_gradient),
}
"""Type of an objective -> the fields that it may have, and how they become a measure."""
