"""Layer maps: which student layer is matched with which teacher layer, as a list of pairs or a rule.

The layers of a stack count from 1; layer 0 is the embeddings, which enter the first layer.
"""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt
from pydantic_core import PydanticCustomError

from gkd_lab.config.errors import ConfigError, suggest_choices

LayerPair = tuple[int, int]
"""(student layer, teacher layer)."""
LayerMap = str | tuple[LayerPair, ...]

UNIFORM = "uniform"
_LAST_RULE = re.compile(r"last_([1-9][0-9]*)")


def parse_layer_map(value: Any) -> LayerMap:
    """Return a layer map: a rule's text unchanged, or a tuple of distinct pairs. ConfigError if invalid."""
    if isinstance(value, str):
        if value != UNIFORM and not _LAST_RULE.fullmatch(value):
            raise ConfigError(f"{value!r} is not a rule; {_suggest_layer_map(value)}")
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(
            f"{value!r} is neither a rule ({UNIFORM}, last_2) nor pairs such as [[1, 2], [2, 4]]"
        )
    pairs = tuple(_parse_layer_pair(number, pair) for number, pair in enumerate(value, 1))
    for pair in pairs:
        if pairs.count(pair) > 1:
            raise ConfigError(f"the pair {list(pair)} is listed twice and would count double: leave one out")
    return pairs


def _suggest_layer_map(rule: str) -> str:
    """Return the end of the message about an unknown rule: the nearest rule and the valid forms."""
    suggestion = suggest_choices(rule, (UNIFORM, "last_1"))
    return f"{suggestion}, last_2 and so on, or a list of pairs [student layer, teacher layer]"


def _parse_layer_pair(number: int, value: Any) -> LayerPair:
    """Return (student layer, teacher layer) from item `number`; ConfigError unless it is two ints from 0."""
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if not is_pair or any(type(layer) is not int or layer < 0 for layer in value):
        raise ConfigError(
            f"pair {number} is {value!r}: give two layers from 0, [student layer, teacher layer], as [1, 2]"
        )
    return value[0], value[1]


def resolve_layer_pairs(
    layers: LayerMap, student_layers: int, teacher_layers: int, *, lowest_layer: int = 0
) -> tuple[LayerPair, ...]:
    """Return the (student layer, teacher layer) pairs of a layer map for models of these depths.

    `uniform` matches student layer i of n with layer ceil(i m / n) of the teacher's m, which is TinyBERT's
    m / n i (Jiao et al. 2020, section 3.2) and PKD-Skip (Sun et al. 2019) where n divides m. `last_k` matches
    the last k layers of both in order (PKD-Last).

    lowest_layer: The lowest layer that a pair may name.

    Raises:
        ConfigError: for a layer that a model does not have, or a rule that needs more layers than it has.
    """
    if layers == UNIFORM:
        return tuple(
            (layer, -(-layer * teacher_layers // student_layers)) for layer in range(1, student_layers + 1)
        )
    if isinstance(layers, str):
        return _pair_last_layers(int(layers.removeprefix("last_")), student_layers, teacher_layers)
    for pair in layers:
        _check_layer_exists("student", pair[0], lowest_layer, student_layers, pair)
        _check_layer_exists("teacher", pair[1], lowest_layer, teacher_layers, pair)
    return layers


def _pair_last_layers(count: int, student_layers: int, teacher_layers: int) -> tuple[LayerPair, ...]:
    """Return (student, teacher) pairs of the last `count` layers, in order. ConfigError if one has fewer."""
    role, depth = min(("student", student_layers), ("teacher", teacher_layers), key=lambda item: item[1])
    if count > depth:
        raise ConfigError(
            f"last_{count}: the depth of the {role} is {depth}; the nearest rule is last_{depth}"
        )
    return tuple((student_layers - offset, teacher_layers - offset) for offset in reversed(range(count)))


def _check_layer_exists(role: str, layer: int, lowest: int, highest: int, pair: LayerPair) -> None:
    """Raise ConfigError if a pair names a layer below `lowest` or above `highest`."""
    if not lowest <= layer <= highest:
        nearest = lowest if layer < lowest else highest
        raise ConfigError(
            f"layer {layer} of the {role}, in the pair {list(pair)}: valid layers are {lowest} to {highest}; "
            f"the nearest is {nearest}"
        )


def _validate_layer_map(value: Any) -> Any:
    """Parse a layer map for pydantic: a ConfigError becomes a pydantic error, which gets a location."""
    try:
        return parse_layer_map(value)
    except ConfigError as error:
        raise PydanticCustomError("layer_map", "{reason}", {"reason": str(error)}) from error


LayerRule = Annotated[str, Field(pattern=r"^(uniform|last_[1-9][0-9]*)$")]
LayerPairs = Annotated[tuple[tuple[NonNegativeInt, NonNegativeInt], ...], Field(min_length=1)]
LayerMapField = Annotated[LayerRule | LayerPairs, BeforeValidator(_validate_layer_map)]
"""Type of a layer map in an experiment file."""
