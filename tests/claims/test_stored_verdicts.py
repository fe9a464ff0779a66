"""Verdicts on the committed tables and on the paper's numbers, against stored ones."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from gkd_lab.claims.definitions import CLAIMS
from gkd_lab.claims.judge import judge, judge_paper
from gkd_lab.claims.measurements import extract_measurements
from gkd_lab.claims.verdicts import ClaimVerdict, encode_verdicts
from gkd_lab.experiments import load
from gkd_lab.report.notebooks import read_table
from gkd_lab.tables.wide_table import wide

STORED = Path(__file__).parent / "fixtures"
TABLES = Path(__file__).parents[2] / "analysis" / "tables"


def assert_stored(verdicts: Sequence[ClaimVerdict], name: str) -> None:
    """Compare verdicts with `fixtures/NAME.json`, numbers to 1e-6 points."""
    rows = json.loads(encode_verdicts(verdicts))
    for row, stored in zip(rows, json.loads((STORED / f"{name}.json").read_text()), strict=True):
        for key in ("effect", "low", "high"):
            assert row.pop(key) == pytest.approx(stored.pop(key), abs=1e-6), (row["id"], key)
        assert row == stored


@pytest.mark.parametrize("name", sorted(path.stem for path in TABLES.glob("*.parquet")))
def test_verdicts_on_a_committed_table_are_the_stored_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GKD_LAB_TABLES", str(TABLES))
    scale = pd.read_parquet(TABLES / f"{name}.parquet").attrs["scale"]
    cells = {cell.fingerprint: cell for cell in load(name, scale=scale, outputs=tmp_path).cells}
    measurements = extract_measurements(wide(read_table(name)), cells)
    assert_stored(judge(CLAIMS.values(), measurements), name)


def test_verdicts_on_the_paper_are_the_stored_ones() -> None:
    assert_stored(judge_paper(CLAIMS.values()), "paper")
