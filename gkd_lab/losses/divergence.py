"""Divergences between the teacher's and the student's next-token distributions (paper, §2).

P is the teacher, Q the student, M = beta P + (1 - beta) Q, so beta weighs the teacher:

    KL(P || Q) = sum P log(P / Q)
    JSD(beta)(P || Q) = beta KL(P || M) + (1 - beta) KL(Q || M),   0 < beta < 1        (Eq. 1)
    TV(P, Q) = 1/2 sum |P - Q|

beta = 0 and beta = 1 stand for forward KL(P || Q) and reverse KL(Q || P), which are the limits of
JSD(beta) / beta and JSD(beta) / (1 - beta), not of JSD(beta) itself: that goes to 0 at both ends.

Shapes: N tokens, V vocabulary. Values are per token; the caller masks and averages. A new kind is one more
name of `DivergenceKind` in `gkd_lab.config.loss_terms` and one more line of `FORMULAS` here.
"""

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from pydantic import ConfigDict, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from gkd_lab.config.loss_terms import DivergenceKind, ResolvedDivergence, Share
from gkd_lab.losses.loss import TeacherLoss


@dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False))
class Divergence(TeacherLoss):
    """One of the divergences, its temperatures and its scale.

    kind: JSD(beta) with the two KLs at its ends, or total variation, which does not read beta.
    rescale: divide JSD(beta) by beta (1 - beta) for 0 < beta < 1. Near P = Q it is beta (1 - beta) / 2 chi^2
        and each KL is chi^2 / 2, so then all betas agree there, and it is continuous at both ends.
    square_temperature: multiply by the product of the two temperatures, T^2 where they are equal, so that
        the gradient keeps its size while both soften (Hinton et al. 2015, section 2).

    Raises ValueError for a beta outside of [0, 1] and for a temperature that is not positive.
    """

    kind: DivergenceKind = "jsd"
    beta: Share = 0.5
    student_temperature: PositiveFloat = 1.0
    teacher_temperature: PositiveFloat = 1.0
    rescale: bool = False
    square_temperature: bool = False

    config_class: ClassVar = ResolvedDivergence
    log_name: ClassVar = "divergence"

    @classmethod
    def build(cls, config: ResolvedDivergence) -> "Divergence":
        """Return the divergence of a resolved config; beta None becomes 0.5 (total variation has none)."""
        return cls(
            kind=config.divergence,
            beta=0.5 if config.beta is None else config.beta,  # total variation has none
            student_temperature=config.student_temperature,
            teacher_temperature=config.teacher_temperature,
            rescale=config.rescale,
            square_temperature=config.square_temperature,
        )

    @property
    def factor(self) -> float:
        """Factor on the value: 1 / (beta (1 - beta)) if `rescale`, times T_s T_t if `square_temperature`."""
        is_rescaled = self.rescale and self.kind == "jsd" and 0 < self.beta < 1
        scale = 1 / (self.beta * (1 - self.beta)) if is_rescaled else 1.0
        squared = self.student_temperature * self.teacher_temperature if self.square_temperature else 1.0
        return scale * squared

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
        """Return the value of each token, (N,), by the formulas above and autograd: the reference."""
        log_q = log_probabilities(student_logits_NV, self.student_temperature)
        log_p = log_probabilities(teacher_logits_NV, self.teacher_temperature)
        return self.factor * FORMULAS[self.kind].value(log_q, log_p, self.beta)

    @torch.no_grad()
    def value_and_gradient(
        self, student_logits_NV: Tensor, teacher_logits_NV: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return each token's value, (N,), gradient by its logits, (N, V), and entropy, (N,); no autograd.

        The values are those of `__call__`; the gradient is by the student's logits as passed in; the entropy
        is the student's at its temperature, in nats.
        """
        log_q = log_probabilities(student_logits_NV, self.student_temperature)
        log_p = log_probabilities(teacher_logits_NV, self.teacher_temperature)
        q, p = log_q.exp(), log_p.exp()
        entropy = -_row_dot(q, log_q)
        value, gradient = FORMULAS[self.kind].value_and_gradient(log_q, q, log_p, p, self.beta)
        factor = self.factor
        if factor / self.student_temperature != 1:
            gradient *= factor / self.student_temperature
        return value.clamp_min_(0).mul_(factor), gradient, entropy


def generalized_jsd(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    beta: float,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """Return each token's JSD(beta) in nats, (N,), never negative; beta 0: forward KL, beta 1: reverse KL.

    Computed in float32 (float64 for float64 logits) whatever the logits' dtype. Logits may be -inf: a
    token that only one side excludes costs a finite amount under JSD and a very large one under a KL.
    """
    log_q = log_probabilities(student_logits_NV, student_temperature)
    log_p = log_probabilities(teacher_logits_NV, teacher_temperature)
    return _jsd(log_q, log_p, beta)


def total_variation(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """Return each token's total variation, 1/2 sum_v |p - q|, (N,), in [0, 1] (paper, §2).

    Computed in float32 (float64 for float64 logits); logits may be -inf.
    """
    log_q = log_probabilities(student_logits_NV, student_temperature)
    log_p = log_probabilities(teacher_logits_NV, teacher_temperature)
    return _total_variation(log_q, log_p)


def pointwise_jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Return JSD(beta) of each entry before the sum over the vocabulary, (..., V); entries may be negative.

    log_q, log_p: (..., V), the student's and the teacher's `log_probabilities`.
    """
    if beta == 0:
        return _pointwise_kl(log_p, log_q)
    if beta == 1:
        return _pointwise_kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _pointwise_kl(log_p, log_m) + (1 - beta) * _pointwise_kl(log_q, log_m)


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / temperature) in float32 (float64 stays), log 0 as a finite number."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scaled = wide if temperature == 1 else wide / temperature
    return scaled.log_softmax(-1).clamp_min(_finite_log_zero(wide))


def _jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Return each token's JSD(beta) from log-probabilities (N, V), (N,), at least 0."""
    return pointwise_jsd(log_q, log_p, beta).sum(-1).clamp_min(0)


def _total_variation(log_q: Tensor, log_p: Tensor, _: float = 0.0) -> Tensor:
    """Return each token's total variation, (N,); the third argument, beta in other formulas, is ignored."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def _pointwise_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p log(p / q) of each entry: KL(p || q) before its sum over the vocabulary."""
    return log_p.exp() * (log_p - log_q)


def _finite_log_zero(reference: Tensor) -> float:
    """Return the dtype's finite stand-in for log 0: 0 * log 0 stays 0, in the value and in the gradient."""
    return torch.finfo(reference.dtype).min / 8


# Below are values, (N,), and their gradients by the student's logits over its temperature, (N, V): with
# g = dD / dlog q they are g - q sum(g). These are the innermost loops, so arguments are overwritten.


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot product of each pair of rows, (N, V) twice -> (N,)."""
    return (left * right).sum(-1)


def _softmax_gradient(gradient: Tensor, q: Tensor, row_sum: Tensor) -> Tensor:
    """Turn dD/dq, in place, into the gradient by the logits: q (dD/dq - row_sum), row_sum = sum q dD/dq."""
    return gradient.sub_(row_sum[:, None]).mul_(q)


def _jsd_family_value_and_gradient(
    log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Return values, (N,), and gradients, (N, V), of forward KL (beta 0), reverse KL (1) or JSD(beta)."""
    if beta == 0:
        return _forward_kl_value_and_gradient(log_q, q, log_p, p)
    if beta == 1:
        return _reverse_kl_value_and_gradient(log_q, q, log_p)
    return _jsd_value_and_gradient(log_q, q, log_p, p, beta)


def _forward_kl_value_and_gradient(
    log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor
) -> tuple[Tensor, Tensor]:
    """Return KL(p || q), (N,), and its gradient by the logits, (N, V), 0 at -inf; overwrites its inputs."""
    value, zero = _row_dot(p, log_p.sub_(log_q)), _finite_log_zero(log_q)
    if log_q.min() > zero:
        return value, q.sub_(p)
    # A logit of -inf stays where it is, so the teacher's mass on it moves no other logit either.
    p.masked_fill_(log_q <= zero, 0)
    return value, q.mul_(p.sum(-1, keepdim=True)).sub_(p)


def _reverse_kl_value_and_gradient(log_q: Tensor, q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(q || p), (N,), and its gradient by the student's logits, (N, V); overwrites its inputs."""
    ratio = log_q.sub_(log_p)
    value = _row_dot(q, ratio)
    return value, _softmax_gradient(ratio, q, value)


def _jsd_value_and_gradient(
    log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    # Below the smallest normal number p and q add nothing, but log 0 would make 0 * inf of it.
    """Return JSD(beta), 0 < beta < 1, (N,), and its gradient by the logits, (N, V); overwrites its inputs."""
    log_m = torch.lerp(q, p, beta).clamp_min_(torch.finfo(q.dtype).tiny).log_()
    teacher_kl = _row_dot(p, log_p.sub_(log_m))
    ratio = log_q.sub_(log_m)
    student_kl = _row_dot(q, ratio)
    value = beta * teacher_kl + (1 - beta) * student_kl
    return value, _softmax_gradient(ratio, q, student_kl).mul_(1 - beta)


def _total_variation_value_and_gradient(
    log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Return total variation, (N,), and its gradient by the student's logits, (N, V); beta is ignored."""
    difference = q - p
    value = difference.abs().sum(-1) / 2
    sign = difference.sign_().div_(2)
    return value, _softmax_gradient(sign, q, _row_dot(q, sign))


class Formula(NamedTuple):
    """The two forms of a divergence.

    value: (log_q, log_p, beta) -> (N,), differentiable.
    value_and_gradient: (log_q, q, log_p, p, beta), all of which it may overwrite -> (N,), (N, V).
    """

    value: Callable[[Tensor, Tensor, float], Tensor]
    value_and_gradient: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


FORMULAS: Mapping[DivergenceKind, Formula] = {
    "jsd": Formula(_jsd, _jsd_family_value_and_gradient),
    "tv": Formula(_total_variation, _total_variation_value_and_gradient),
}
