"""Write the range of scores of the SFT students behind the committed tables, which warnings compare with."""

import json
from pathlib import Path
from typing import Any

from gkd_lab import experiments
from gkd_lab.config.cell import list_references
from gkd_lab.tables import training_facts
from gkd_lab.tables.load_table import read_table_file
from gkd_lab.tables.rows import get_primary_metric
from gkd_lab.tables.training_facts import COMMITTED_STARTS, get_start_key

TABLES = Path(__file__).parent / "tables"


def collect_starts(path: Path) -> dict[str, dict[str, Any]]:
    """Return key -> range of scores of a table's SFT students, of those that its experiment has now."""
    table = read_table_file(path)
    table = table[(table["role"] == "start") & (table["checkpoint"] != "best") & table["value"].notna()]
    values: dict[str, list[float]] = {}
    metrics: dict[str, str] = {}
    for reference in list_references(experiments.load(path.stem).cells):
        evaluation, metric = get_primary_metric(reference.cells[0])
        scores = table[
            (table["cell"] == reference.model.fingerprint)
            & (table["metric"] == metric)
            & (table["evaluation"] == evaluation.name)
        ]["value"]
        if reference.role == "start" and reference.model.sft is not None and len(scores):
            key = get_start_key(reference)
            values.setdefault(key, []).append(round(float(scores.iloc[0]), 3))
            metrics[key] = metric
    return {
        key: {
            "metric": metrics[key], "low": min(scores), "high": max(scores), "seeds": len(scores),
            "table": path.stem,
        }
        for key, scores in values.items()
    }  # fmt: skip


def collect_all_starts() -> dict[str, dict[str, Any]]:
    """Return the ranges of all tables; of several with the same students the one with most seeds counts."""
    starts: dict[str, dict[str, Any]] = {}
    for path in sorted(TABLES.glob("*.parquet")):
        if not path.stem.endswith(".examples"):
            for key, entry in collect_starts(path).items():
                if key not in starts or starts[key]["seeds"] < entry["seeds"]:
                    starts[key] = entry
    return starts


def main() -> None:
    """Write the file."""
    starts = collect_all_starts()
    target = Path(training_facts.__file__).with_name(COMMITTED_STARTS)
    target.write_text(json.dumps(starts, indent=1, sort_keys=True) + "\n")
    print(f"{len(starts)} kinds of SFT students")


if __name__ == "__main__":
    main()
