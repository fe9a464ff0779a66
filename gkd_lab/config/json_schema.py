"""`python -m gkd_lab.config.json_schema [FILE]` writes the JSON Schema of experiment files, for editors."""

import json
import sys
from pathlib import Path
from typing import Any

from gkd_lab.config.experiment import ExperimentFile
from gkd_lab.config.fingerprint import FORMAT_VERSION

SCHEMA_PATH = Path("experiments/experiment.schema.json")
"""Place in a source checkout; the first line of each experiment names the file."""


def build_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of experiment files as a dictionary, without titles and null defaults.

    Its `$id` holds the format version: the same file under another version describes other runs.
    """
    schema = _strip_titles_and_nulls(ExperimentFile.model_json_schema(by_alias=True))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:gkd-lab:experiment:{FORMAT_VERSION}",
        **schema,
    }


def format_json_schema() -> str:
    """Return the schema as JSON text, indented, as the schema file has it."""
    return json.dumps(build_json_schema(), indent=2, ensure_ascii=False) + "\n"


def _strip_titles_and_nulls(schema: Any) -> Any:
    """Return a copy of a schema without titles, which repeat names, and defaults of null, at any depth."""
    if isinstance(schema, list):
        return [_strip_titles_and_nulls(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _strip_titles_and_nulls(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str)) and not (key == "default" and value is None)
    }


def main() -> None:
    """Write the schema to the path in the first argument, by default SCHEMA_PATH, and print the path."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else SCHEMA_PATH
    path.write_text(format_json_schema(), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
