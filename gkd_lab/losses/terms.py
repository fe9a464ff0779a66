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

from gkd_lab.config.reward_names import BUILT_IN, check_baseline, check_model, check_name
from gkd_lab.losses.adversarial import OF_GAME, Adversarial
from gkd_lab.losses.attentions import Attentions
from gkd_lab.losses.auxiliary_losses import StepMeasure
from gkd_lab.losses.divergence import Divergence, log_probabilities
from gkd_lab.losses.hidden_states import HiddenStates
from gkd_lab.losses.layer_stacks import OF_LAYERS
from gkd_lab.losses.squared_error import AGAINST, SquaredError, against_labels
from gkd_lab.losses.teacher_targets import Target
from gkd_lab.losses.uld import OF_ULD, Uld


class OfLabels(ABC):
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
class CrossEntropy(OfLabels):
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
class PolicyGradient(OfLabels):
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
        check_name(self.name)
        check_model(self.name, self.model)
        check_baseline(self.baseline, self.normalize)

    @property
    def rule(self) -> tuple[str, str | None, str | None]:
        """What says how texts are rewarded: name, model and its revision."""
        return self.name, self.model, self.revision

    def value_and_gradient(
        self, student_logits_NV: Tensor, labels_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As cross-entropy's: values, (N,), gradients, (N, V), and the student's entropy, (N,), in nats."""
        return CrossEntropy().value_and_gradient(student_logits_NV, labels_N)


@dataclass(frozen=True)
class LabelError(OfLabels):
    """(student - label)^2: what a regression learns of the data's own numbers."""

    kind: ClassVar[str] = "squared_error_labels"
    on_policy: ClassVar[bool] = False

    def value_and_gradient(
        self, student_logits_NV: Tensor, labels_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `SquaredError`'s, of one output a row. ValueError: there are more."""
        return against_labels(student_logits_NV, labels_N)


OfTeacher = Divergence | SquaredError
"""Measures of single tokens that compare with a teacher's logits."""
Measure = OfTeacher | OfLabels | StepMeasure


FIRST = Target()


@dataclass(frozen=True)
class Term:
    """A measure and its weight in the loss, which may move linearly to another one over the training.

    target: of a divergence, which teachers it compares with.
    """

    measure: Measure
    weight: float = 1.0
    final_weight: float | None = None
    target: Target = FIRST

    def at(self, progress: float) -> "Term":
        """The term after this share of the training's steps, its weight constant."""
        if self.final_weight is None:
            return self
        weight = self.weight + progress * (self.final_weight - self.weight)
        return replace(self, weight=weight, final_weight=None)

    @property
    def name(self) -> str:
        """Under which the term is logged."""
        return "divergence" if isinstance(self.measure, Divergence) else self.measure.kind

    @property
    def is_of_tokens(self) -> bool:
        """Whether it is computed token by token from the logits."""
        return not isinstance(self.measure, StepMeasure)

    @property
    def reads_labels(self) -> bool:
        """Whether it reads the tokens themselves."""
        return isinstance(self.measure, OfLabels)

    @property
    def teachers(self) -> tuple[int, ...]:
        """Numbers of the teachers that it reads."""
        if isinstance(self.measure, OfTeacher):
            return self.target.teachers
        return (0,) if isinstance(self.measure, StepMeasure) and self.measure.reads_teacher else ()

    def applies(self, *, on_policy: bool) -> bool:
        """Whether it teaches anything of text that the student wrote (`on_policy`), or that others wrote."""
        return not isinstance(self.measure, OfLabels) or self.measure.on_policy == on_policy


Terms = tuple[Term, ...]


def terms_of(objective: Measure | Sequence[Term]) -> Terms:
    """A measure alone is the only term, of weight 1."""
    if isinstance(objective, OfTeacher | OfLabels | StepMeasure):
        return (Term(objective),)
    return tuple(objective)


def where_they_apply(terms: Terms, *, on_policy: bool) -> Terms:
    """The same with weight 0 for what teaches nothing of such text."""
    return tuple(
        term if term.applies(on_policy=on_policy) else Term(term.measure, 0.0, target=term.target)
        for term in terms
    )


def names(terms: Terms) -> list[str]:
    """A name for each term of a cell: `divergence`, `divergence_2`, ..."""
    seen: dict[str, int] = {}
    named = []
    for term in terms:
        seen[term.name] = seen.get(term.name, 0) + 1
        named.append(term.name if seen[term.name] == 1 else f"{term.name}_{seen[term.name]}")
    return named


def teachers_read(all_terms: Iterable[Terms]) -> list[int]:
    """Numbers of the teachers that any of the terms reads, in their order."""
    return sorted({teacher for terms in all_terms for term in terms for teacher in term.teachers})


def asked_for(all_terms: Iterable[Terms]) -> tuple[str, ...]:
    """What passes record besides what heads read, in alphabetical order."""
    measures = [term.measure for terms in all_terms for term in terms]
    return tuple(sorted({ask for one in measures if isinstance(one, StepMeasure) for ask in one.asks}))


def reads_texts(all_terms: Iterable[Terms]) -> bool:
    """Whether any of the terms lets the teacher read texts in its own tokens."""
    return any(isinstance(term.measure, Uld) for terms in all_terms for term in terms)


# ---- as they are written in a configuration ----

Fields = Mapping[str, Any]


def parsed(listed: Sequence[Fields], default: Divergence) -> Terms:
    """Terms as they are written in a configuration; `default` has what a divergence does not say.

    Raises:
        ValueError: for an unknown type, an unknown field, weights that are not numbers from 0, or all 0.
    """
    terms = tuple(_parsed(one, default) for one in listed)
    if terms and not any(term.weight or term.final_weight for term in terms):
        raise ValueError("objectives: all weights are 0, so nothing would be learnt; give one a weight")
    return terms


def _parsed(one: Fields, default: Divergence) -> Term:
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
    target = Target(**{name: _as_written(fields.pop(name)) for name in _OF_TARGET if name in fields})
    return Term(read(fields, default), weight, final, target)


def _as_written(value: Any) -> Any:
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


def _policy_gradient(fields: Fields, _: Divergence) -> PolicyGradient:
    if "name" not in fields:
        raise ValueError(f"objectives: a reward needs a name: {', '.join(BUILT_IN)}, or module:function")
    return PolicyGradient(**fields)


def _squared_error(fields: Fields, _: Divergence) -> SquaredError | LabelError:
    against = fields.get("against", "teacher")
    if against not in AGAINST:
        raise ValueError(f"objectives: squared_error: against {against!r} is not one of {', '.join(AGAINST)}")
    return SquaredError() if against == "teacher" else LabelError()


READERS: dict[str, tuple[Sequence[str], Callable[[Fields, Divergence], Measure]]] = {
    "divergence": ((*_OF_DIVERGENCE, *_OF_TARGET), _divergence),
    "cross_entropy": ((), lambda fields, _: CrossEntropy()),
    SquaredError.kind: (("against",), _squared_error),
    HiddenStates.kind: (OF_LAYERS, lambda fields, _: HiddenStates(**fields)),
    Attentions.kind: (OF_LAYERS, lambda fields, _: Attentions(**fields)),
    Adversarial.kind: (OF_GAME, lambda fields, _: Adversarial(**fields)),
    Uld.kind: (OF_ULD, lambda fields, _: Uld(**fields)),
    "reward": (_OF_REWARD, _policy_gradient),
}
"""Type of an objective -> the fields that it may have, and how they become a measure."""
