"""What an lm-eval task is known by: its name in a version of lm-eval, or the content of a task file.

A task file is read here as data: its `!function` tags, which would run Python, stay texts. No torch.
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

from gkd_lab.config.errors import ConfigError, report_yaml_errors

TASK_FILE_SUFFIXES = (".yaml", ".yml")
SHIPPED_TASKS_FOLDER = Path(__file__).parent.parent / "evaluation" / "lm_tasks"
"""Our own tasks as lm-eval YAMLs."""
PACKAGE_FUNCTION_PREFIX = "gkd_lab.evaluation.lm_scores."


@dataclass(frozen=True)
class FunctionTag:
    """A `!function` tag: `module.name`, looked for in `folder` first."""

    text: str
    folder: Path

    @property
    def local_file(self) -> Path | None:
        """The Python file beside the task file that it names, if there is one."""
        path = self.folder / (self.text.rpartition(".")[0].replace(".", "/") + ".py")
        return path if path.is_file() else None

    @property
    def is_installed(self) -> bool:
        """Whether it is code of lm-eval's own tasks or of this package."""
        if any(
            self.folder.is_relative_to(place)
            for place in (SHIPPED_TASKS_FOLDER, _find_lm_eval_tasks_folder())
        ):
            return True
        return self.text.startswith(PACKAGE_FUNCTION_PREFIX) and self.local_file is None


@dataclass(frozen=True)
class LmEvalTask:
    """A task by name, or (with `content`, SHA-256) one that a file describes."""

    name: str
    content: str | None = None
    path: str | None = None


def get_lm_eval_version() -> str:
    """The installed version, without importing it."""
    return importlib.metadata.version("lm_eval")


def resolve_lm_eval_task(name: str, *, trusted: bool = False) -> LmEvalTask:
    """The task that a name or a YAML file stands for. Raises SpecError for a file that cannot be used.

    A name is checked when lm-eval is at work: its index of tasks takes seconds to read.
    """
    if not name.endswith(TASK_FILE_SUFFIXES):
        return LmEvalTask(name)
    config = read_task_file(Path(name), trusted=trusted)
    return LmEvalTask(config["task"], hash_task_config(config), str(Path(name).resolve()))


def read_task_file(path: Path, *, trusted: bool = False) -> dict[str, Any]:
    """A task's configuration with what it includes; paths of data are absolute. Raises SpecError.

    Relative paths of data start at the file's folder, or where the command runs if there is nothing there.
    """
    config = _merge_includes(path, ())
    if "group" in config:
        raise ConfigError(f"{path}: a group of tasks; name its tasks instead, one file each")
    if not isinstance(config.get("task"), str) or not config["task"]:
        raise ConfigError(f"{path}: `task`, the name of the task, is missing")
    if not trusted:
        _refuse_foreign_code(path, config)
    if not config.keys() & {"dataset_path", "custom_dataset", "class"}:
        raise ConfigError(f"{path}: `dataset_path`, where its documents come from, is missing")
    _resolve_data_paths(path, config)
    return config


def hash_task_config(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration whose files enter by their content, wherever they lie."""
    text = json.dumps(config, sort_keys=True, default=_serialize_value)
    for file in list_data_files(config):
        text = text.replace(json.dumps(str(file)), json.dumps(f"sha256:{_hash_file(file)}"))
    return hashlib.sha256(text.encode()).hexdigest()


def list_data_files(config: Mapping[str, Any]) -> list[Path]:
    """The local files that a task's documents come from."""
    places = map(Path, _list_strings((config.get("dataset_kwargs") or {}).get("data_files")))
    return [place for place in places if place.is_file()]


class _TaskFileLoader(yaml.SafeLoader):
    """Plain data, and `!function` as a text that knows its folder."""

    folder: Path


def _construct_function_tag(loader: _TaskFileLoader, node: yaml.ScalarNode) -> FunctionTag:
    return FunctionTag(str(loader.construct_scalar(node)), loader.folder)


_TaskFileLoader.add_constructor("!function", _construct_function_tag)


def load_task_yaml(path: Path) -> dict[str, Any]:
    """One file, its includes left as they are. Raises SpecError."""
    with report_yaml_errors(path):
        loader = _TaskFileLoader(path.read_text(encoding="utf-8"))
        loader.folder = path.resolve().parent
        document = loader.get_single_data()
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected `field: value` lines, got {type(document).__name__}")
    return document


def _merge_includes(path: Path, ancestors: tuple[Path, ...]) -> dict[str, Any]:
    """As lm-eval merges: what a file includes first, its own fields win."""
    if path.resolve() in ancestors:
        raise ConfigError(f"{path}: includes itself")
    own = load_task_yaml(path)
    merged: dict[str, Any] = {}
    for name in _list_strings(own.pop("include", None)):
        merged |= _merge_includes(path.parent / Path(name).expanduser(), (*ancestors, path.resolve()))
    return merged | own


def _refuse_foreign_code(path: Path, config: Mapping[str, Any]) -> None:
    foreign = [f.text for f in _walk_leaves(config) if isinstance(f, FunctionTag) and not f.is_installed]
    if foreign or "class" in config or config.get("dataset_path") == "pandas":  # which reads pickles
        what = f"!function {foreign[0]}" if foreign else "class"
        what = what if foreign or "class" in config else "dataset_path: pandas"
        raise ConfigError(
            f"{path}: `{what}` would run Python code; if you trust it, use "
            "`gkd-lab evaluate ... --trust-remote-code`"
        )


def _resolve_data_paths(path: Path, config: dict[str, Any]) -> None:
    folder = path.resolve().parent
    place = config.get("dataset_path")
    if isinstance(place, str) and (folder / place).is_dir():
        config["dataset_path"] = str(folder / place)
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
    if isinstance(value, dict):
        return {key: _resolve_data_files(path, folder, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve_data_files(path, folder, item) for item in value]
    if not isinstance(value, str):
        raise ConfigError(f"{path}: dataset_kwargs.data_files: expected a file's path, got {value!r}")
    if "://" in value or any(mark in value for mark in "*?["):
        return value
    place = Path(value).expanduser()
    found = next((p for p in (folder / place, place.absolute()) if p.is_file()), None)
    if found is None:
        raise ConfigError(f"{path}: dataset_kwargs.data_files: no file {str(folder / place)!r}")
    return str(found)


def _list_strings(value: Any) -> list[str]:
    return [text for text in _walk_leaves(value) if isinstance(text, str)]


def _walk_leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _walk_leaves(item)
    else:
        yield value


def _serialize_value(value: Any) -> str:
    """A value that JSON has no form for; a function by its name and the code beside the task file."""
    if isinstance(value, FunctionTag):
        return f"!function {value.text} {_hash_file(value.local_file) if value.local_file else ''}"
    return str(value)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _find_lm_eval_tasks_folder() -> Path:
    found = importlib.util.find_spec("lm_eval")
    assert found is not None and found.submodule_search_locations, "lm-eval is a dependency"
    return Path(found.submodule_search_locations[0]).resolve() / "tasks"
