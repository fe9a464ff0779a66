"""A named check of a pair of models, and the result that it measures."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from gkd_lab.selfcheck.bench import PairBench

PAIR_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that a model's or tokenizer's own code may raise."""


@dataclass(frozen=True)
class InvarianceResult:
    """A check's measurement; it passes if `error_size` is at most `tolerance`, which NaN is not."""

    error_size: float
    tolerance: float
    measurement: str
    """The value with its unit, as shown in the table."""
    reason: str = ""
    """What a failure means."""
    note: str = ""
    """Remark that is printed even if the check passes."""

    @property
    def passed(self) -> bool:
        """Whether the error size is at most the tolerance; NaN fails."""
        return self.error_size <= self.tolerance


@dataclass(frozen=True)
class InvarianceCheck:
    """A named check; `meaning` is the invariance in a few words."""

    name: str
    meaning: str
    measure: Callable[[PairBench], InvarianceResult]
    batched_models: tuple[str, ...] = ()
    """Models ("student", "teacher") whose outputs it compares in batches of other lengths or neighbours."""

    def __call__(self, bench: PairBench) -> InvarianceResult:
        """Measure the pair; an error within the pair's own code is a failed check."""
        try:
            result = self.measure(bench)
        except PAIR_ERRORS as error:
            return create_error_result(error)
        causes = [
            bench.length_dependence[side] for side in self.batched_models if side in bench.length_dependence
        ]
        return replace(result, reason="; ".join(causes)) if causes and not result.passed else result


def create_failed_result(reason: str, measurement: str = "-") -> InvarianceResult:
    """Return a result that fails (infinite error) for this reason, without a measured error."""
    return InvarianceResult(math.inf, 0.0, measurement, reason)


def create_error_result(error: Exception) -> InvarianceResult:
    """Return a failed result with the exception's type and message as its reason; nothing is raised."""
    return create_failed_result(f"{type(error).__name__}: {error}")
