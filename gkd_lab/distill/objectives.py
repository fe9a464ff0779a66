"""What a loss is made of: measures of single tokens, each with its weight.

Shapes: N tokens, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gkd_lab.distill.divergence import Divergence, log_probabilities


@dataclass(frozen=True)
class CrossEntropy:
    """-log q of the token that is there: the hard labels of Hinton et al. (2015), Sequence KD's loss
    (Kim and Rush 2016), and that of supervised fine-tuning.
    """

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


Measure = Divergence | CrossEntropy


@dataclass(frozen=True)
class Term:
    """A measure and its weight in the loss, which may move linearly to another one over the training."""

    measure: Measure
    weight: float = 1.0
    final_weight: float | None = None

    def at(self, progress: float) -> "Term":
        """The term after this share of the training's steps, its weight constant."""
        if self.final_weight is None:
            return self
        weight = self.weight + progress * (self.final_weight - self.weight)
        return Term(self.measure, weight)

    @property
    def name(self) -> str:
        """Under which the term is logged."""
        return "cross_entropy" if isinstance(self.measure, CrossEntropy) else "divergence"


Terms = tuple[Term, ...]


def terms_of(objective: Measure | Sequence[Term]) -> Terms:
    """A measure alone is the only term, of weight 1."""
    if isinstance(objective, Divergence | CrossEntropy):
        return (Term(objective),)
    return tuple(objective)


def parsed(listed: Sequence[Mapping[str, Any]], default: Divergence) -> Terms:
    """Terms as they are written in a configuration; `default` has what a divergence does not say.

    Raises:
        ValueError: for an unknown type, an unknown field, or a weight that is not a number from 0.
    """
    return tuple(_parsed(one, default) for one in listed)


def _parsed(one: Mapping[str, Any], default: Divergence) -> Term:
    fields = {"type": "divergence", "weight": 1.0, "final_weight": None, **one}
    kind, weight, final = (fields.pop(name) for name in ("type", "weight", "final_weight"))
    for value in (weight, 0 if final is None else final):
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"objectives: weight {value!r} of {kind} is not a number from 0")
    if kind not in ("divergence", "cross_entropy"):
        raise ValueError(f"objectives: type {kind!r} is not one of 'divergence', 'cross_entropy'")
    known = _FIELDS if kind == "divergence" else {}
    for name in fields:
        if name not in known:
            has = f"; it has {', '.join(known)} and weight" if known else "; it has a weight only"
            raise ValueError(f"objectives: {kind} has no field {name!r}{has}")
    if kind == "cross_entropy":
        return Term(CrossEntropy(), weight, final)
    return Term(replace(default, **{known[name]: value for name, value in fields.items()}), weight, final)


_FIELDS = {
    "divergence": "kind",
    "beta": "beta",
    "rescale": "rescale",
    "teacher_temperature": "teacher_temperature",
    "student_temperature": "student_temperature",
}
"""What an experiment calls it, and a `Divergence`."""


def without_labels(terms: Terms) -> Terms:
    """The same with weight 0 for what reads the tokens themselves."""
    return tuple(Term(term.measure, 0.0) if _reads_labels(term) else term for term in terms)


def _reads_labels(term: Term) -> bool:
    return isinstance(term.measure, CrossEntropy)


def names(terms: Terms) -> list[str]:
    """A name for each term of a cell: `divergence`, `divergence_2`, ..."""
    seen: dict[str, int] = {}
    named = []
    for term in terms:
        seen[term.name] = seen.get(term.name, 0) + 1
        named.append(term.name if seen[term.name] == 1 else f"{term.name}_{seen[term.name]}")
    return named


def reads_teacher(terms: Terms) -> bool:
    """Whether any of the terms compares with a teacher."""
    return any(isinstance(term.measure, Divergence) for term in terms)


def reads_labels(terms: Terms) -> bool:
    """Whether any of the terms reads the tokens themselves."""
    return any(_reads_labels(term) for term in terms)
