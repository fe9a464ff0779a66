"""What makes two descriptions the same: canonical JSON, hashed.

Every field counts, defaults included, except those marked `NotHashed` (where something lies or what it is
called, not what it is) and those marked `DefaultFrom` while they hold the value that reproduces older records.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from json.encoder import encode_basestring
from typing import Any

from pydantic import BaseModel, ConfigDict

from gkd_lab.config.errors import ConfigError

FORMAT_VERSION = 1
"""Raised when a default or a meaning changes, so that older records are not taken for new ones."""

SHOWN_DIGITS = 8
"""Hexadecimal digits of a fingerprint that are shown."""


@dataclass(frozen=True)
class NotHashed:
    """Marks a field that says where or under which name, and so does not enter the fingerprint."""


@dataclass(frozen=True)
class DefaultFrom:
    """Marks a field that came later: at `before`, the value that older code had built in, it is left out."""

    old_value: Any


class Frozen(BaseModel):
    """An immutable, closed description that knows its canonical form."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @cached_property
    def canonical_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, integral floats written as integers."""
        parts = []
        for name, marks in _list_marked_fields(type(self)):
            value = getattr(self, name)
            if not any(_is_excluded(mark, value) for mark in marks):
                parts.append(f'"{name}":{canonical_json(value)}')
        return "{" + ",".join(parts) + "}"

    @cached_property
    def full_fingerprint(self) -> str:
        """SHA-256 of the canonical form together with the format version, 64 hexadecimal digits."""
        return hashlib.sha256(f"{FORMAT_VERSION}:{self.canonical_json}".encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """The shown part of the fingerprint."""
        return self.full_fingerprint[:SHOWN_DIGITS]


_MARKED_FIELDS: dict[type, list[tuple[str, tuple[Any, ...]]]] = {}


def _list_marked_fields(model: type[BaseModel]) -> list[tuple[str, tuple[Any, ...]]]:
    if model not in _MARKED_FIELDS:
        fields = model.model_fields
        _MARKED_FIELDS[model] = [
            (name, tuple(m for m in fields[name].metadata if isinstance(m, NotHashed | DefaultFrom)))
            for name in sorted(fields)
        ]
    return _MARKED_FIELDS[model]


def _is_excluded(mark: Any, value: Any) -> bool:
    return isinstance(mark, NotHashed) or (isinstance(mark, DefaultFrom) and bool(value == mark.old_value))


def canonical_json(value: Any) -> str:
    """The one text of `value`. Raises SpecError for a value without a stable form."""
    if isinstance(value, Frozen):
        return value.canonical_json
    if isinstance(value, str):
        return encode_basestring(value)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{value!r} has no stable form: a description holds finite numbers only")
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, tuple | list):
        return "[" + ",".join(canonical_json(item) for item in value) + "]"
    if isinstance(value, Mapping):
        items = sorted((str(key), item) for key, item in value.items())
        return "{" + ",".join(f"{encode_basestring(k)}:{canonical_json(v)}" for k, v in items) + "}"
    raise ConfigError(f"{value!r} ({type(value).__name__}) has no stable form to be identified by")
