"""The YAML file of a run, read before any heavy library, so that its `env` can still reach them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gkd_lab.config.errors import ConfigError, suggest_choices
from gkd_lab.config.yaml_files import read_yaml_mapping


def split_config_option(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return (the file of `--config FILE` or `--config=FILE`, the other words). ConfigError: none, two."""
    paths, rest, remaining = [], [], list(words)
    while remaining:
        word = remaining.pop(0)
        if word == "--config":
            if not remaining or remaining[0].startswith("--"):
                raise ConfigError("--config has no value: give a YAML file, as `--config run.yaml`")
            paths.append(remaining.pop(0))
        elif word.startswith("--config="):
            paths.append(word.partition("=")[2])
        else:
            rest.append(word)
    if len(paths) > 1:
        raise ConfigError(f"--config is given twice: {paths[0]!r} and {paths[1]!r}")
    return (Path(paths[0]) if paths else None), rest


def read_config(path: Path) -> dict[str, Any]:
    """Return the options of a YAML file, after setting the environment variables of its `env`, as TRL does.

    Raises ConfigError for a file that cannot be read or is no mapping.
    """
    if path.is_dir():
        raise ConfigError(f"--config {str(path)!r} is a folder; give a YAML file")
    if not path.exists():
        siblings = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = f"; {suggest_choices(path.name, siblings)}" if siblings else ""
        raise ConfigError(f"--config {str(path)!r}: there is no such file{hint}")
    config, _ = read_yaml_mapping(path, "lmbda: 0.5")
    environment = config.pop("env", {})
    if not isinstance(environment, dict):
        raise ConfigError(f"{path}: env must be `VARIABLE: value` lines")
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return config
