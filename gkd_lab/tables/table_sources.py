"""From which code, packages and machine the numbers of a table are: kept inside a parquet file."""

import json
from typing import Any

from gkd_lab.config import Grid
from gkd_lab.store import Store

_PROVENANCE_FIELDS = ("gkd_lab", "commit", "changed", "python", "packages", "machine", "device", "threads")


def collect_table_provenance(grid: Grid, store: Store) -> dict[str, Any]:
    """Experiment, scale, and for each distinct origin of its finished cells how many have it."""
    origins: dict[str, int] = {}
    for cell in grid.cells:
        facts = store.get_record(cell).read_provenance()
        if facts:
            origin = json.dumps({name: facts.get(name) for name in _PROVENANCE_FIELDS}, sort_keys=True)
            origins[origin] = origins.get(origin, 0) + 1
    return {
        "experiment": grid.name,
        "scale": grid.scale,
        "origins": [{"cells": count, **json.loads(origin)} for origin, count in origins.items()],
    }
