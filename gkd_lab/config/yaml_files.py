"""Read YAML by the core schema of version 1.2, with the line of each value.

In YAML 1.1, which PyYAML reads by itself, `no` is false, `010` is 8 and `1:30` is 90. Here they are text,
which the field of a number refuses. https://yaml.org/spec/1.2.2/#103-core-schema
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from gkd_lab.config.errors import ConfigError, Location, Origin

_TAG = "tag:yaml.org,2002:"
# Leading zeros, and the bases of `0o17` and `0x1f` that the core schema knows, are text on purpose.
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_PLAIN_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (_INTEGER.pattern, list("-+0123456789")),
    "float": (f"{_FLOAT.pattern}|{_INFINITE.pattern}", list("-+.0123456789")),
    "merge": ("<<", ["<"]),
}
"""Type -> (pattern of its plain text, first characters of such text)."""


class CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain scalars of YAML 1.2 and without repeated keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's table, here of this class alone

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return a mapping's node; YAMLError if a key stands in it twice, of which PyYAML takes the last."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                if key.value in lines:
                    problem = f"{key.value!r} is given twice, first in line {lines[key.value]}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                lines[key.value] = key.start_mark.line + 1
        return node


def _construct_number(loader: CoreLoader, node: yaml.ScalarNode) -> int | float:
    """Return a number, -0.0 as 0.0; YAMLError if a tag such as `!!int` stands before other text."""
    text = loader.construct_scalar(node)
    if _INTEGER.fullmatch(text) and node.tag == f"{_TAG}int":
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text) + 0.0
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", ""))
    raise yaml.constructor.ConstructorError(None, None, f"{text!r} is not a number", node.start_mark)


for _type, (_pattern, _first_characters) in _PLAIN_SCALARS.items():
    CoreLoader.add_implicit_resolver(_TAG + _type, re.compile(rf"(?:{_pattern})\Z"), _first_characters)
for _type in ("int", "float"):
    CoreLoader.add_constructor(_TAG + _type, _construct_number)


def parse_yaml(text: str) -> Any:
    """Return the content of YAML text, read by the core schema of YAML 1.2. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=CoreLoader)


def suggest_plain_number(text: str) -> str | None:
    """Return, for text such as `010` or `1_000` that Python alone reads as a number, how JSON writes it.

    None for a number of JSON or YAML 1.2, and for what Python does not read as a finite number.
    """
    if _FLOAT.fullmatch(text.strip()):
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return str(int(value)) if value.is_integer() else repr(value)


def read_yaml_mapping(path: Path, example: str) -> tuple[dict[Any, Any], Origin]:
    """Return (content of a YAML file, its name with the line of each value).

    example: A line such as `task: arithmetic`, for the message. ConfigError: unreadable, empty, no mapping.
    """
    with convert_yaml_errors(path):
        loader = CoreLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        content = None if node is None else loader.construct_document(node)
        lines = {} if node is None else dict(_list_lines(node, (), set()))
    if content is None:
        raise ConfigError(f"{path}: the file is empty; expected `field: value` lines, such as `{example}`")
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: expected `field: value` lines, such as `{example}`, got {type(content).__name__}"
        )
    return content, Origin(str(path), lines)


def _list_lines(node: yaml.Node, location: Location, visited: set[int]) -> Iterator[tuple[Location, int]]:
    """Yield (location, line from 1) of each value inside a YAML node; the line of its key where it has one.

    visited: Ids of nodes; what an alias repeats is listed at its first place only.
    """
    if id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.MappingNode):
        items = [(key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    elif isinstance(node, yaml.SequenceNode):
        items = [(number, value, value) for number, value in enumerate(node.value)]
    else:
        return
    for name, marked, value in items:
        yield (*location, name), marked.start_mark.line + 1
        yield from _list_lines(value, (*location, name), visited)


@contextmanager
def convert_yaml_errors(path: Path) -> Iterator[None]:
    """Re-raise errors of reading a YAML file inside the `with` block as a one-line ConfigError."""
    try:
        yield
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_describe_yaml_error(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid YAML: it is nested too deeply") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start : error.start + 1]
        raise ConfigError(f"{path}:{line}: not UTF-8 text, at the byte {byte!r}: save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error


def _describe_yaml_error(error: yaml.YAMLError) -> str:
    """Return `:LINE: not valid YAML: PROBLEM` of PyYAML's error; without a line where it knows none."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    reason = " ".join(str(problem or error).split())
    return f"{f':{mark.line + 1}' if mark else ''}: not valid YAML: {reason}"
