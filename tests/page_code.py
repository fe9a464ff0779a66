"""Imports the code of a documentation page, for the tests that hold pages to be true."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_page_module(name: str, text: str, folder: Path) -> ModuleType:
    """Write a page's code to a file below `folder`, import it under `name` and return the module."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
