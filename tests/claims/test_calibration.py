"""Verdicts on simulated tables of known truth: the small form of `benchmarks/calibration.py`."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last: its names are common ones

from calibration import Check, Shares, build_table, count_verdicts, judge_scores, list_checks
from calibration_cases import CASES
from calibration_simulation import Case, Noise, simulate_block

import gkd_lab

TABLES = 100
SMALL_FORM = (
    "C1 table only, 3 seeds",
    "C1, all noises, 200 examples, 5 seeds",
    "C1 accuracy 97 %, table only, 50 examples, 2 seeds",
    "C1 five columns, all null, 5 seeds",
    "C3 at -margin, 10 seeds",
    "C3 equal, margin of 2 SD, 10 seeds",
    "C5 true, λ worth 2, 20 seeds",
    "C5 even span = effect at each, 3 seeds",
    "C6b all equal, 20 seeds",
    "C8 no spans, noise falling with γ, 5 seeds",
)
"""Cases in which the rules before these gave false verdicts, or found nothing."""


def get_case(name: str) -> Case:
    """Return the case of this name."""
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("name", SMALL_FORM)
def test_shares_of_verdicts_are_within_three_binomial_errors_of_their_limits(name: str) -> None:
    case = get_case(name)
    judged = [judge_scores(case, *scores) for scores in simulate_block(case, 0, TABLES)]
    shares = count_verdicts(case, judged)
    assert shares.intervals == TABLES
    checks = list_checks(case, shares)
    assert checks and not [check for check in checks if check.mark == "!"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_states_the_margin_and_the_effect_that_its_claim_finds_with_little_noise(case: Case) -> None:
    quiet = replace(case, noise=Noise(seeds=0.01), seeds=5, has_examples=False, distribution="normal")
    ((scores, _),) = simulate_block(quiet, 0, 1)
    assert judge_scores(quiet, scores, None).effect == pytest.approx(case.effect, abs=0.05)
    assert gkd_lab.judge(build_table(quiet), [case.claim])["margin"].tolist() == [case.margin]


@pytest.mark.parametrize(
    ("hits", "tables", "limit", "is_upper", "mark"),
    [
        (140, 4000, 0.035, True, ""),
        (170, 4000, 0.035, True, "~"),
        (180, 4000, 0.035, True, "!"),
        (3720, 4000, 0.93, False, ""),
        (3690, 4000, 0.93, False, "~"),
        (3660, 4000, 0.93, False, "!"),
        (2, 10, 0.035, True, "~"),
        (0, 0, 0.93, False, ""),
    ],
)
def test_a_mark_tells_a_limit_that_is_missed_from_one_within_the_error(
    hits: int, tables: int, limit: float, is_upper: bool, mark: str
) -> None:
    """Binomial errors: 0.29 and 0.40 points at 4,000 tables."""
    assert Check("share", hits, tables, limit, is_upper).mark == mark


def test_limits_follow_from_the_truth() -> None:
    shares = Shares(100, 3, 2, 100, 95, 1.0, 0.0)
    names = {
        "C1, all noises, 200 examples, 5 seeds": ["coverage", "coverage", "holds", "fails"],
        "C3 at -margin, 3 seeds": ["coverage", "holds", "fails"],
        "C3 equal, margin of 2 SD, 10 seeds": ["coverage", "fails", "holds"],
        "C5 true, λ worth 2, 5 seeds": ["coverage", "fails"],
        "C26 ratio of times, 5 seeds": ["coverage"],
        "stress: C1 table only, method x example, 5 seeds": [],
    }
    for name, expected in names.items():
        assert [check.name for check in list_checks(get_case(name), shares)] == expected
