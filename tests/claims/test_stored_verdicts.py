"""Verdicts on the committed tables and on the paper's numbers, against stored ones.

`python tests/claims/test_stored_verdicts.py` stores them anew: read the difference before you commit it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import gkd_lab
from gkd_lab.claims.judge import judge_paper, judge_table, load_example_lookup
from gkd_lab.claims.verdict_text import encode_verdicts
from gkd_lab.claims.verdicts import ClaimVerdict

STORED = Path(__file__).parent / "fixtures"
TABLES = Path(__file__).parents[2] / "analysis" / "tables"
NAMES = sorted(path.stem for path in TABLES.glob("*.parquet") if not path.stem.endswith(".examples"))
NUMBERS = ("effect", "low", "high", "n", "margin")
TEXTS = ("id", "verdict", "method", "detail")


def judge(name: str) -> list[ClaimVerdict]:
    """Judge a committed table, with the examples beside it if there are any."""
    path = TABLES / f"{name}.parquet"
    return judge_table(gkd_lab.table(path), None, *load_example_lookup(path))


def assert_stored(verdicts: Sequence[ClaimVerdict], name: str) -> None:
    """Compare verdicts with `fixtures/NAME.json`, numbers to 1e-6 points."""
    rows = json.loads(encode_verdicts(verdicts))
    for row, stored in zip(rows, json.loads((STORED / f"{name}.json").read_text()), strict=True):
        for key in NUMBERS:
            assert row[key] == pytest.approx(stored[key], abs=1e-6), (row["id"], key)
        for key in TEXTS:
            assert row[key] == stored[key], row["id"]


@pytest.mark.parametrize("name", NAMES)
def test_verdicts_on_a_committed_table_are_the_stored_ones(name: str) -> None:
    assert_stored(judge(name), name)


def test_verdicts_on_the_paper_are_the_stored_ones() -> None:
    assert_stored(judge_paper(), "paper")


def store(verdicts: Sequence[ClaimVerdict], name: str) -> None:
    """Write verdicts to `fixtures/NAME.json`, a line each."""
    rows = []
    for row in json.loads(encode_verdicts(verdicts)):
        numbers = {key: row[key] if row[key] is None else round(row[key], 9) for key in NUMBERS}
        values = {**row, **numbers}
        fields = {key: values[key] for key in ("id", "verdict", *NUMBERS, "method", "detail")}
        rows.append(json.dumps(fields, ensure_ascii=False))
    (STORED / f"{name}.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    for table in NAMES:
        store(judge(table), table)
    store(judge_paper(), "paper")
