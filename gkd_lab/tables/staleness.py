"""Whether a committed table is what today's code and experiment would make."""

from collections.abc import Iterator
from pathlib import Path

from gkd_lab import experiments
from gkd_lab.config import ConfigError
from gkd_lab.store.code_hash import compute_code_hash
from gkd_lab.tables.load_table import list_committed_tables, read_table_file


def list_stale_tables() -> dict[str, list[str]]:
    """Return name -> reasons of each table in `analysis/tables` that may no longer be what is asked for."""
    reasons = {name: list(find_stale_reasons(path)) for name, path in list_committed_tables().items()}
    return {name: texts for name, texts in reasons.items() if texts}


def find_stale_reasons(path: Path) -> Iterator[str]:
    """Yield why a table file may differ from one that was made today; nothing if it is current."""
    table = read_table_file(path)
    codes = {origin.get("code") for origin in table.attrs.get("origins", ())}
    if codes != {compute_code_hash()}:
        made_by = ", ".join(sorted(code or "unknown" for code in codes)) or "unknown"
        yield f"made by code {made_by}, now {compute_code_hash()}"
    try:
        grid = experiments.load(table.attrs["experiment"], scale=table.attrs["scale"])
    except (KeyError, ConfigError) as error:
        yield f"its experiment cannot be loaded: {error}"
        return
    stored = set(table.loc[table["role"] == "cell", "cell"])
    missing = [cell for cell in grid.cells if cell.fingerprint not in stored]
    if missing:
        yield f"{len(missing)} of the {len(grid.cells)} cells that its experiment asks for are not in it"
