"""Keep the results of the parts of `gpu.sh` in one JSON file, and print them as a table.

    python benchmarks/gpu_results.py missing
    python benchmarks/gpu_results.py add FILE NAME EXIT_STATUS SECONDS [PART.json]
    python benchmarks/gpu_results.py show FILE

`missing` names the packages that the parts need and this Python lacks, with exit status 1 if there are any.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = {
    **{
        name.replace("-", "_"): name
        for name in (
            *("torch", "transformers", "tokenizers", "safetensors", "accelerate", "trl", "datasets", "dill"),
            *("multiprocess", "pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
            *("nltk", "rouge-score", "numpy", "pandas", "pyarrow", "xxhash", "rich", "jinja2", "psutil"),
        )
    },
    "yaml": "pyyaml",
}
"""Module -> package."""
TIMED_OUT = (124, 137)
"""Exit statuses of `timeout`."""
TARGET = "10 x, then 15 x"
"""Speed-up of a grid against TRL's loop that we aim at."""


def list_missing() -> list[str]:
    """Return the packages that cannot be found."""
    return [package for name, package in PACKAGES.items() if importlib.util.find_spec(name) is None]


def add_part(file: Path, name: str, exit_status: int, seconds: float, part: Path | None) -> dict[str, Any]:
    """Add a part to the file, which is replaced as a whole, and return what was added."""
    results = json.loads(file.read_text()) if file.exists() else {}
    states = {0: "done", **dict.fromkeys(TIMED_OUT, "out of time")}
    entry: dict[str, Any] = {"status": states.get(exit_status, f"failed ({exit_status})"), "seconds": seconds}
    if part is not None and part.exists():
        entry["figures"] = json.loads(part.read_text())
    results[name] = entry
    temporary = file.with_name(file.name + ".new")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(file)
    return entry


def summarize(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures of a part as lines of text."""
    lines = []
    for precision in ("fp32", "bf16"):
        row = figures.get("comparison", {}).get(precision)
        if row:
            speed_up, over_floor = row["trl_s"] / row["ours_s"], row["ours_s"] / row["floor_s"]
            lines.append(f"{precision}: {speed_up:.1f} x TRL (target {TARGET}), {over_floor:.1f} x the floor")
    for point in figures.get("curve", []):
        peak = f", {point['peak_mib']:,.0f} MiB" if "peak_mib" in point else ""
        lines.append(f"K = {point['cells']}: {1000 * point['per_cell_s']:.1f} ms a cell{peak}")
    for row in figures.get("loss", []):
        lines.append(
            f"{row['method']}, beta {row['beta']:g}: {1000 * row['seconds']:.1f} ms, {row['mib']:,.0f} MiB"
        )
    steps = figures.get("steps", [])
    if isinstance(steps, dict):
        lines += [f"{way}: {figure['step_ms']:.0f} ms a step" for way, figure in steps.items()]
    else:
        lines += [
            f"{row['size']}, lmbda {row['lmbda']:g}: {row['ours_ms']:.0f} ms, {row['ratio']:.2f} x TRL's time"
            for row in steps
        ]
    for way, row in figures.get("placement", {}).items():
        peak = f", {row['peak_mib']:,.0f} MiB" if "peak_mib" in row else ""
        lines.append(f"{way}: {row['step_ms']:.0f} ms a step{peak}")
    return lines


def print_results(file: Path) -> int:
    """Print a block a part; return 1 if one of them is not done, else 0."""
    results = json.loads(file.read_text())
    for name, entry in results.items():
        print(f"{name:10} {entry['status']:12} {entry['seconds']:5.0f} s")
        for line in summarize(entry.get("figures", {})):
            print(f"{'':10} {line}")
    return int(any(entry["status"] != "done" for entry in results.values()))


def main(arguments: list[str]) -> int:
    """Run one of the three commands; return the exit status."""
    command, *rest = arguments
    if command == "missing":
        missing = list_missing()
        print(" ".join(missing))
        return int(bool(missing))
    file = Path(rest[0])
    if command == "show":
        return print_results(file)
    name, exit_status, seconds = rest[1:4]
    part = Path(rest[4]) if rest[4:] else None
    add_part(file, name, int(exit_status), float(seconds), part)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
