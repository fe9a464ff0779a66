"""Settings merged layer by layer, each value with the place that stated it: a default, a line, an axis."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gkd_lab.config.errors import Location, Origin
from gkd_lab.config.settings import merge_settings

SourceKind = Literal["scale", "task", "data", "student", "file", "axis", "method", "derived", "built-in"]


@dataclass(frozen=True)
class ValueSource:
    """The place that stated a value."""

    kind: SourceKind
    """`scale`, `task`, `data`, `student`: a default; `derived`: computed; `built-in`: default of the spec."""
    location: Location = ()
    """Of `file`, `axis` and `method`: keys that lead to it in the experiment file."""
    detail: str = ""
    """Of `student` and `method` its name, of `derived` how it was computed."""

    def describe(self, origin: Origin, task: str, scale: str) -> str:
        """Return the source in words, such as `mine.yaml:7` or `default of arithmetic at nano`."""
        defaults = {
            "scale": f"default of all tasks at {scale}",
            "task": f"default of {task} at {scale}",
            "data": f"default of {task} at {scale}, for data that is not made",
            "student": f"default of {task} at {scale}, for {self.detail}",
            "derived": self.detail,
            "built-in": "built-in default",
        }
        if self.kind in defaults:
            return defaults[self.kind]
        key, origin = origin.find_set_field(self.location), Origin(Path(origin.name).name, origin.lines)
        place = f"--set {key}" if key else origin.format_place(self.location)
        if self.kind == "method":
            return f"method {self.detail}, {place}"
        if self.kind == "axis":
            return f"axis {self.location[1]}, {place}"
        section = self.location[:2] if self.location[:1] in (("per_task",), ("per_scale",)) else ()
        return f"{place} ({'.'.join(map(str, section))})" if section else place


class SourcedSettings:
    """Nested settings and the source of each value in them; later layers win, sections merge by field."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._sources: dict[Location, ValueSource] = {}

    def merge(self, layer: Mapping[str, Any], source: ValueSource) -> None:
        """Merge a layer over the settings, as `merge_settings` does.

        source: Of all values of the layer; of `file` its location is that of the layer in the file.
        """

        def locate(path: Location) -> ValueSource:
            return replace(source, location=(*source.location, *path)) if source.kind == "file" else source

        self._merge(layer, locate)

    def merge_sourced(self, other: "SourcedSettings", exclude: tuple[str, ...] = ()) -> None:
        """Merge other settings over these, with their sources, without the keys in `exclude`."""
        layer = {name: value for name, value in other.values.items() if name not in exclude}
        self._merge(layer, other._sources.__getitem__)

    def _merge(self, layer: Mapping[str, Any], locate: Callable[[Location], ValueSource]) -> None:
        """Merge a layer over the settings; `locate` returns the source of the value at a path."""
        self._replace_sources((), self.values, layer, locate)
        self.values = merge_settings(self.values, dict(layer))

    def rename_leaf(self, name: str, path: Location) -> None:
        """Make a section of a value, which moves to `path` in it: `small` -> `{size: small}`."""
        source = self._sources.pop((name,))
        value = self.values[name]
        for key in reversed(path):
            value = {key: value}
        self.values = {**self.values, name: value}
        self._sources[(name, *path)] = source

    def find(self, path: Location) -> tuple[ValueSource, ...]:
        """Return the distinct sources of a value: its own, of its parts, or of the list that holds it."""
        if path in self._sources:
            return (self._sources[path],)
        inside = {source: None for place, source in self._sources.items() if place[: len(path)] == path}
        if inside:
            return tuple(inside)
        for length in range(len(path) - 1, 0, -1):
            source = self._sources.get(path[:length])
            if source is not None:
                if source.kind == "file":
                    source = replace(source, location=(*source.location, *path[length:]))
                return (source,)
        return ()

    def _replace_sources(
        self,
        prefix: Location,
        before: Mapping[str, Any],
        layer: Mapping[str, Any],
        locate: Callable[[Location], ValueSource],
    ) -> None:
        """Note the sources of a layer's values, and forget those of what they replace."""
        for key, value in layer.items():
            path = (*prefix, key)
            if isinstance(value, dict) and isinstance(before.get(key), dict):
                self._replace_sources(path, before[key], value, locate)
                continue
            if key in before:
                replaced = [place for place in self._sources if place[: len(path)] == path]
                for place in replaced:
                    del self._sources[place]
            for leaf in _list_leaves(path, value):
                self._sources[leaf] = locate(leaf)


def _list_leaves(path: Location, value: Any) -> Iterator[Location]:
    """Yield the paths of the values in nested dictionaries; an empty dictionary and a list are values."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _list_leaves((*path, key), part)
    else:
        yield path
