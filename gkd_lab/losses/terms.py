"""The terms of a loss: each a loss with its weight and its teachers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gkd_lab.losses.auxiliary_losses import AuxiliaryLoss
from gkd_lab.losses.loss import LabelLoss, Loss, TeacherLoss, TokenLoss
from gkd_lab.losses.teacher_targets import TeacherTarget

FIRST_TEACHER_TARGET = TeacherTarget()


@dataclass(frozen=True)
class WeightedLoss:
    """A term of the loss; its weight may move linearly to another one over the training.

    target: the teachers that a `TeacherLoss` compares with.
    """

    loss: Loss
    weight: float = 1.0
    final_weight: float | None = None
    target: TeacherTarget = FIRST_TEACHER_TARGET

    def interpolate_weight(self, progress: float) -> "WeightedLoss":
        """Return the term with the constant weight that it has after this share (0 to 1) of the steps."""
        if self.final_weight is None:
            return self
        weight = self.weight + progress * (self.final_weight - self.weight)
        return replace(self, weight=weight, final_weight=None)

    @property
    def is_token_loss(self) -> bool:
        """Whether its loss is computed token by token from the logits, not by an auxiliary module."""
        return isinstance(self.loss, TokenLoss)

    @property
    def reads_labels(self) -> bool:
        """Whether its loss compares with the tokens themselves (a `LabelLoss`)."""
        return isinstance(self.loss, LabelLoss)

    @property
    def teachers(self) -> tuple[int, ...]:
        """Numbers of the teachers whose logits or outputs it reads; empty if it reads none."""
        if isinstance(self.loss, TeacherLoss):
            return self.target.teachers
        return (0,) if isinstance(self.loss, AuxiliaryLoss) and self.loss.reads_teacher else ()

    def is_applicable(self, *, on_policy: bool) -> bool:
        """Whether it learns from the student's own text (`on_policy`) or, if False, from other text.

        Label losses learn from one of the two, all other losses from both.
        """
        return not isinstance(self.loss, LabelLoss) or self.loss.on_policy == on_policy


WeightedLosses = tuple[WeightedLoss, ...]


def are_rows_routed(all_terms: Iterable[WeightedLosses]) -> bool:
    """Return whether a divergence is routed, so that a row's column `teacher` says whose it is."""
    return any(term.target.routed for terms in all_terms for term in terms)


def list_terms(terms: Loss | Sequence[WeightedLoss]) -> WeightedLosses:
    """Return the terms as a tuple; a loss without a weight becomes the only term, of weight 1."""
    return (WeightedLoss(terms),) if isinstance(terms, Loss) else tuple(terms)


def zero_inapplicable_terms(terms: WeightedLosses, *, on_policy: bool) -> WeightedLosses:
    """Return all terms, with weight 0 for those that learn nothing from such text."""
    return tuple(
        term if term.is_applicable(on_policy=on_policy) else WeightedLoss(term.loss, 0.0, target=term.target)
        for term in terms
    )


def term_names(terms: WeightedLosses) -> list[str]:
    """Return each term's unique log name, in order: `divergence`, `divergence_2` for a second one, ..."""
    counts: dict[str, int] = {}
    names = []
    for term in terms:
        name = term.loss.log_name
        counts[name] = counts.get(name, 0) + 1
        names.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return names


def required_teachers(all_terms: Iterable[WeightedLosses]) -> list[int]:
    """Return the numbers of the teachers that any term reads, in ascending order."""
    return sorted({teacher for terms in all_terms for term in terms for teacher in term.teachers})


def required_outputs(all_terms: Iterable[WeightedLosses]) -> tuple[str, ...]:
    """Return the outputs besides logits, such as "attentions", that any term reads, in alphabetical order."""
    losses = [term.loss for terms in all_terms for term in terms]
    outputs = {name for loss in losses if isinstance(loss, AuxiliaryLoss) for name in loss.required_outputs}
    return tuple(sorted(outputs))


def needs_text_reader(all_terms: Iterable[WeightedLosses]) -> bool:
    """Whether any term, as ULD does, needs a teacher that reads texts in its own tokens."""
    losses = [term.loss for terms in all_terms for term in terms]
    return any(isinstance(loss, AuxiliaryLoss) and loss.reads_texts for loss in losses)
