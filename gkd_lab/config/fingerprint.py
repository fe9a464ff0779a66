"""Fingerprints identify specs: the SHA-256 of a spec's canonical JSON.

Every field is hashed, defaults included, except a field marked `NotHashed` (a place or a display name) and a
field marked `DefaultFrom` while it has its old value, so that records older than the field keep their ids.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from json.encoder import encode_basestring
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from gkd_lab.config.errors import ConfigError

FORMAT_VERSION = 1
"""Increase it when a default or a meaning changes: older records then get other fingerprints."""

SHOWN_DIGITS = 8
"""Hexadecimal digits of a fingerprint in folder names and output."""


@dataclass(frozen=True)
class NotHashed:
    """Mark a field that is not part of the identity, such as a path or a display name."""


@dataclass(frozen=True)
class DefaultFrom:
    """Mark a field added later. It is not hashed while it has `old_value`, which older code implied."""

    old_value: Any


class Frozen(BaseModel):
    """An immutable spec that rejects unknown fields and has a fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @cached_property
    def canonical_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, integral floats as integers, unhashed fields left out."""
        items = []
        for name, key, old_values in _list_hashed_fields(type(self)):
            value = getattr(self, name)
            if not old_values or value not in old_values:
                items.append(key + canonical_json(value))
        return "{" + ",".join(items) + "}"

    @cached_property
    def full_fingerprint(self) -> str:
        """SHA-256 of the canonical JSON and the format version: 64 hexadecimal digits."""
        return compute_fingerprint(self.canonical_json)

    @property
    def fingerprint(self) -> str:
        """The first 8 hexadecimal digits of the full fingerprint."""
        return self.full_fingerprint[:SHOWN_DIGITS]


Spec = TypeVar("Spec", bound=Frozen)


def replace_fields(spec: Spec, **changes: Any) -> Spec:
    """Return a spec with some fields changed; unlike `model_copy` without the cached fingerprint."""
    fields = {name: getattr(spec, name) for name in type(spec).model_fields}
    return type(spec)(**fields | changes)


def compute_fingerprint(canonical: str) -> str:
    """Return the SHA-256 of canonical JSON and the format version, 64 hexadecimal digits."""
    return hashlib.sha256(f"{FORMAT_VERSION}:{canonical}".encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """Return a value as canonical JSON text, keys sorted; ConfigError for one without a stable form."""
    encode = _ENCODERS.get(type(value))
    return _encode_other_type(value) if encode is None else encode(value)


def _encode_float(value: float) -> str:
    """Return a finite number, as an integer if it is one; ConfigError for infinity and NaN."""
    if not math.isfinite(value):
        raise ConfigError(f"{value!r} has no canonical JSON: a spec holds finite numbers only")
    return str(int(value)) if value.is_integer() else repr(value)


def _encode_list(values: Iterable[Any]) -> str:
    """Return the values as a JSON array."""
    return "[" + ",".join([canonical_json(value) for value in values]) + "]"


def _encode_mapping(values: Mapping[Any, Any]) -> str:
    """Return a mapping as a JSON object with sorted keys."""
    items = sorted((str(key), item) for key, item in values.items())
    return "{" + ",".join([f"{encode_basestring(k)}:{canonical_json(v)}" for k, v in items]) + "}"


# By type: `isinstance` of a pydantic model takes longer than all else, and a spec is mostly plain values.
_ENCODERS: dict[type, Callable[[Any], str]] = {
    str: encode_basestring,
    type(None): lambda _: "null",
    bool: lambda value: "true" if value else "false",
    int: str,
    float: _encode_float,
    tuple: _encode_list,
    list: _encode_list,
    dict: _encode_mapping,
}


def _encode_other_type(value: Any) -> str:
    """Return canonical JSON of a spec, or of a value of a type derived from a plain one; ConfigError else."""
    if isinstance(value, Frozen):
        return value.canonical_json
    if isinstance(value, Mapping):
        return _encode_mapping(value)
    for plain_type in (str, int, float, tuple, list):
        if isinstance(value, plain_type):
            return _ENCODERS[plain_type](value)
    raise ConfigError(f"{value!r} ({type(value).__name__}) has no canonical JSON, so it has no fingerprint")


@cache
def _list_hashed_fields(model: type[BaseModel]) -> list[tuple[str, str, list[Any]]]:
    """Return (name, its JSON key, old values of `DefaultFrom` marks) of each hashed field, sorted."""
    return [
        (name, f'"{name}":', [mark.old_value for mark in field.metadata if isinstance(mark, DefaultFrom)])
        for name, field in sorted(model.model_fields.items())
        if not any(isinstance(mark, NotHashed) for mark in field.metadata)
    ]
