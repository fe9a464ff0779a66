"""`python -m gkd_lab.config.json_schema [FILE]` writes the JSON Schema of experiment files."""

import json
import sys
from pathlib import Path

from gkd_lab.config.experiment import build_json_schema

SCHEMA_PATH = Path("experiments/experiment.schema.json")
"""Beside the experiments of a source checkout; their first line names it."""


def format_json_schema() -> str:
    """The file's content."""
    return json.dumps(build_json_schema(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the schema to the file that is named, or to its place in the checkout."""
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else SCHEMA_PATH
    place.write_text(format_json_schema(), encoding="utf-8")
    print(f"wrote {place}")


if __name__ == "__main__":
    main()
