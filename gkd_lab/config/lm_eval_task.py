"""Identify an lm-eval task: by its name in a version of lm-eval, or by the content of a task file.

A task file is read as data: its `!function` tags, which would run Python code, stay text.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from gkd_lab.config.content_hashes import compute_sha256
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.yaml_files import convert_yaml_errors

TASK_FILE_SUFFIXES = (".yaml", ".yml")
SHIPPED_TASKS_FOLDER = Path(__file__).parent.parent / "evaluation" / "lm_tasks"
"""Tasks of this package as lm-eval YAML files."""
PACKAGE_FUNCTION_PREFIX = "gkd_lab.evaluation.lm_scores."


@dataclass(frozen=True)
class FunctionTag:
    """A `!function module.name` tag; the module is looked for in `folder` first."""

    text: str
    folder: Path

    @property
    def local_file(self) -> Path | None:
        """The Python file in `folder` that holds the function; None if there is none."""
        path = self.folder / (self.text.rpartition(".")[0].replace(".", "/") + ".py")
        return path if path.is_file() else None

    @property
    def is_installed(self) -> bool:
        """Whether the function belongs to lm-eval's own tasks or to this package, so needs no trust."""
        if any(
            self.folder.is_relative_to(path) for path in (SHIPPED_TASKS_FOLDER, _find_lm_eval_tasks_folder())
        ):
            return True
        return self.text.startswith(PACKAGE_FUNCTION_PREFIX) and self.local_file is None


@dataclass(frozen=True)
class LmEvalTask:
    """An lm-eval task: known by name, or by a task file with the SHA-256 `content`."""

    name: str
    content: str | None = None
    path: str | None = None


def get_lm_eval_version() -> str:
    """Return the installed version of lm-eval from its metadata, without importing it."""
    return importlib.metadata.version("lm_eval")


def resolve_lm_eval_task(name: str, *, trusted: bool = False) -> LmEvalTask:
    """Return an LmEvalTask: by name only, or by a YAML file with its content's hash. ConfigError: bad file.

    A name is not checked before lm-eval runs: reading its index of tasks takes seconds.
    """
    if not name.endswith(TASK_FILE_SUFFIXES):
        return LmEvalTask(name)
    config = read_task_file(Path(name), trusted=trusted)
    return LmEvalTask(config["task"], hash_task_config(config), str(Path(name).resolve()))


def read_task_file(path: Path, *, trusted: bool = False) -> dict[str, Any]:
    """Return a task file's fields, includes merged and data paths absolute. Raises ConfigError.

    A relative data path is looked for in the file's folder, then in the current folder. A file that would run
    Python code is refused unless it is `trusted`.
    """
    config = _merge_includes(path, ())
    if "group" in config:
        raise ConfigError(f"{path}: a group of tasks; name its tasks instead, one file each")
    if not isinstance(config.get("task"), str) or not config["task"]:
        raise ConfigError(f"{path}: `task`, the name of the task, is missing")
    if not trusted:
        _refuse_foreign_code(path, config)
    if not config.keys() & {"dataset_path", "custom_dataset", "class"}:
        raise ConfigError(f"{path}: `dataset_path`, the source of its documents, is missing")
    _resolve_data_paths(path, config)
    return config


def hash_task_config(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a task's configuration, with data files by content instead of path."""
    text = json.dumps(config, sort_keys=True, default=_serialize_value)
    for file in list_data_files(config):
        text = text.replace(json.dumps(str(file)), json.dumps(f"sha256:{compute_sha256(file)}"))
    return hashlib.sha256(text.encode()).hexdigest()


def list_data_files(config: Mapping[str, Any]) -> list[Path]:
    """Return the existing local files that `dataset_kwargs.data_files` names."""
    paths = map(Path, _list_strings((config.get("dataset_kwargs") or {}).get("data_files")))
    return [path for path in paths if path.is_file()]


class _TaskFileLoader(yaml.SafeLoader):
    """YAML loader that keeps a `!function` tag as text, with its folder."""

    folder: Path


def _construct_function_tag(loader: _TaskFileLoader, node: yaml.ScalarNode) -> FunctionTag:
    """Return a `!function` YAML node as a FunctionTag; nothing is imported."""
    return FunctionTag(str(loader.construct_scalar(node)), loader.folder)


_TaskFileLoader.add_constructor("!function", _construct_function_tag)


def load_task_yaml(path: Path) -> dict[str, Any]:
    """Return the fields of one task file, its includes not read. ConfigError: unreadable, no mapping."""
    with convert_yaml_errors(path):
        loader = _TaskFileLoader(path.read_text(encoding="utf-8"))
        loader.folder = path.resolve().parent
        document = loader.get_single_data()
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected `field: value` lines, got {type(document).__name__}")
    return document


def _merge_includes(path: Path, ancestors: tuple[Path, ...]) -> dict[str, Any]:
    """Return a task file's fields over those of its includes, recursively. ConfigError: includes itself."""
    if path.resolve() in ancestors:
        raise ConfigError(f"{path}: includes itself")
    fields = load_task_yaml(path)
    merged: dict[str, Any] = {}
    for name in _list_strings(fields.pop("include", None)):
        merged |= _merge_includes(path.parent / Path(name).expanduser(), (*ancestors, path.resolve()))
    return merged | fields


def _refuse_foreign_code(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ConfigError if a task would run Python code from neither lm-eval nor this package."""
    tags = (leaf for leaf in _walk_leaves(config) if isinstance(leaf, FunctionTag))
    foreign = [tag.text for tag in tags if not tag.is_installed]
    if foreign:
        offender = f"!function {foreign[0]}"
    elif "class" in config:
        offender = "class"
    elif config.get("dataset_path") == "pandas":  # which reads pickles
        offender = "dataset_path: pandas"
    else:
        return
    raise ConfigError(
        f"{path}: `{offender}` would run Python code; if you trust it, use "
        "`gkd-lab evaluate ... --trust-remote-code`"
    )


def _resolve_data_paths(path: Path, config: dict[str, Any]) -> None:
    """Make a configuration's data paths absolute, in place. ConfigError: wrong type, or no such file."""
    folder = path.resolve().parent
    dataset_path = config.get("dataset_path")
    if isinstance(dataset_path, str) and (folder / dataset_path).is_dir():
        config["dataset_path"] = str(folder / dataset_path)
    kwargs = config.get("dataset_kwargs")
    if kwargs is None:
        return
    if not isinstance(kwargs, dict):
        raise ConfigError(f"{path}: dataset_kwargs: expected `field: value` lines, got {kwargs!r}")
    config["dataset_kwargs"] = dict(kwargs)
    if "data_files" in kwargs:
        config["dataset_kwargs"]["data_files"] = _resolve_data_files(path, folder, kwargs["data_files"])
    if "data_dir" in kwargs:
        config["dataset_kwargs"]["data_dir"] = str(folder / str(kwargs["data_dir"]))


def _resolve_data_files(path: Path, folder: Path, value: Any) -> Any:
    """Return `data_files`, nested alike, with absolute paths; URLs and patterns stay. Raises ConfigError."""
    if isinstance(value, dict):
        return {key: _resolve_data_files(path, folder, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve_data_files(path, folder, item) for item in value]
    if not isinstance(value, str):
        raise ConfigError(f"{path}: dataset_kwargs.data_files: expected a file's path, got {value!r}")
    if "://" in value or any(character in value for character in "*?["):
        return value
    file = Path(value).expanduser()
    for candidate in (folder / file, file.absolute()):
        if candidate.is_file():
            return str(candidate)
    raise ConfigError(f"{path}: dataset_kwargs.data_files: no file {str(folder / file)!r}")


def _list_strings(value: Any) -> list[str]:
    """Return the strings among the values of nested lists and mappings, in order."""
    return [leaf for leaf in _walk_leaves(value) if isinstance(leaf, str)]


def _walk_leaves(value: Any) -> Iterator[Any]:
    """Yield the values inside nested lists and mappings, depth first; a mapping's keys are left out."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _walk_leaves(item)
    else:
        yield value


def _serialize_value(value: Any) -> str:
    """Return text for a value that JSON cannot hold; a FunctionTag as its name and its file's hash."""
    if isinstance(value, FunctionTag):
        return f"!function {value.text} {compute_sha256(value.local_file) if value.local_file else ''}"
    return str(value)


@cache
def _find_lm_eval_tasks_folder() -> Path:
    """Return the folder of lm-eval's own tasks without importing it."""
    package = importlib.util.find_spec("lm_eval")
    assert package is not None and package.submodule_search_locations, "lm-eval is a dependency"
    return Path(package.submodule_search_locations[0]).resolve() / "tasks"
