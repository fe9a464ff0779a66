"""Runs each notebook whose table lies in `analysis/tables`, and keeps what it shows."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path) -> None:
    """Run a notebook where it lies; without times, so that equal results are equal files."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, record_timing=False, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    notebook.metadata.pop("language_info", None)  # the version of Python that happened to run it
    nbformat.write(notebook, path)


def main() -> None:
    for table in sorted((HERE / "tables").glob("*.parquet")):
        path = HERE / f"{table.stem}.ipynb"
        if path.is_file():
            execute(path)
            print(path.name)


if __name__ == "__main__":
    main()
