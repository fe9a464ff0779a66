"""Divergences between the teacher's and the student's next-token distributions (paper, §2).

P is the teacher, Q the student, M = beta P + (1 - beta) Q, so beta weighs the teacher:

    JSD(beta)(P || Q) = beta KL(P || M) + (1 - beta) KL(Q || M),   0 < beta < 1        (Eq. 1)

beta = 0 and beta = 1 stand for forward KL(P || Q) and reverse KL(Q || P), which are the limits of
JSD(beta) / beta and JSD(beta) / (1 - beta), not of JSD(beta) itself: that goes to 0 at both ends.

Shapes: N tokens, V vocabulary. Values are per token; masking and averaging are the caller's.
"""

import math

import torch
from torch import Tensor


def generalized_jsd(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    beta: float,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """JSD(beta) in nats of each token, (N,), with the two KLs at beta 0 and 1; never negative.

    Computed in float32 (float64 for float64 logits) whatever the logits' dtype. Logits may be -inf: a
    token that only one side excludes costs a finite amount under JSD and a very large one under a KL.
    """
    log_q = _log_probabilities(student_logits_NV, student_temperature)
    log_p = _log_probabilities(teacher_logits_NV, teacher_temperature)
    if beta == 0:
        value = _kl(log_p, log_q)
    elif beta == 1:
        value = _kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        value = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return value.clamp_min(0)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p log(p / q), (N,)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scaled = wide if temperature == 1 else wide / temperature
    # A finite stand-in for log 0 keeps 0 * log 0 at 0, in the value and in the gradient.
    return scaled.log_softmax(-1).clamp_min(torch.finfo(wide.dtype).min / 8)
