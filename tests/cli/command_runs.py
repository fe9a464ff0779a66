"""Commands in processes of their own, and experiment files, for the tests of the command line."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

RunCommand = Callable[..., tuple[int, str, str]]
BLOCKED = ("torch", "transformers", "datasets", "evaluate", "trl", "accelerate", "wandb", "lm_eval")


def write_experiment(text: str, name: str = "mine.yaml") -> str:
    Path(name).write_text(text)
    return name


def python(code: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **more})


BLOCK = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None  # importing it raises ImportError
from gkd_lab.cli import main
main()
"""
