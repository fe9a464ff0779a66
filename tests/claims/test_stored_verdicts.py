"""Verdicts on the committed tables and on the paper's numbers, against stored ones."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import gkd_lab
from gkd_lab.claims.judge import judge_paper, judge_table
from gkd_lab.claims.verdict_text import encode_verdicts
from gkd_lab.claims.verdicts import ClaimVerdict

STORED = Path(__file__).parent / "fixtures"
TABLES = Path(__file__).parents[2] / "analysis" / "tables"
NUMBERS = ("effect", "low", "high", "n", "margin")


def assert_stored(verdicts: Sequence[ClaimVerdict], name: str) -> None:
    """Compare verdicts with `fixtures/NAME.json`, numbers to 1e-6 points."""
    rows = json.loads(encode_verdicts(verdicts))
    for row, stored in zip(rows, json.loads((STORED / f"{name}.json").read_text()), strict=True):
        for key in NUMBERS:
            assert row[key] == pytest.approx(stored[key], abs=1e-6), (row["id"], key)
        for key in ("id", "verdict", "method", "detail"):
            assert row[key] == stored[key], row["id"]


@pytest.mark.parametrize("name", sorted(path.stem for path in TABLES.glob("*.parquet")))
def test_verdicts_on_a_committed_table_are_the_stored_ones(name: str) -> None:
    assert_stored(judge_table(gkd_lab.table(TABLES / f"{name}.parquet")), name)


def test_verdicts_on_the_paper_are_the_stored_ones() -> None:
    assert_stored(judge_paper(), "paper")
