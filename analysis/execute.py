"""Run each notebook that has a table in `analysis/tables`, and store its outputs.

That of the quickstart reads records instead, and is run where there are some.
"""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
OUTPUTS = HERE / os.environ.get("GKD_LAB_OUTPUTS", "../outputs")


def execute(path: Path) -> None:
    """Run a notebook in its folder and write it back, without times: equal results are equal files."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, record_timing=False, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    notebook.metadata.pop("language_info", None)  # it names the version of Python
    nbformat.write(notebook, path)


def main() -> None:
    """Run all notebooks that have a table, the quickstart's if it was run here, and `your_own_figure`."""
    execute(HERE / "your_own_figure.ipynb")
    for table in sorted((HERE / "tables").glob("*.parquet")):
        path = HERE / f"{table.stem}.ipynb"
        if path.is_file() and (table.stem != "quickstart" or OUTPUTS.is_dir()):
            execute(path)
            print(path.name)


if __name__ == "__main__":
    main()
