"""Which layer of a student is matched with which of its teacher: by a list of pairs, or by a rule.

Layers of a stack are counted from 1; 0 is what goes into the first, the embeddings.
"""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt
from pydantic_core import PydanticCustomError

from gkd_lab.config.errors import ConfigError, suggest_choices

LayerPair = tuple[int, int]
"""(layer of the student, layer of the teacher)."""
LayerMap = str | tuple[LayerPair, ...]

UNIFORM = "uniform"
_LAST_RULE = re.compile(r"last_([1-9][0-9]*)")


def parse_layer_map(value: Any) -> LayerMap:
    """A map as it is written. Raises SpecError for what is neither a rule nor a list of pairs, each once."""
    if isinstance(value, str):
        if value != UNIFORM and not _LAST_RULE.fullmatch(value):
            raise ConfigError(f"{value!r} is no rule; {_suggest_layer_map(value)}")
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(
            f"{value!r} is neither a rule ({UNIFORM}, last_2) nor pairs such as [[1, 2], [2, 4]]"
        )
    pairs = tuple(_parse_layer_pair(number, one) for number, one in enumerate(value, 1))
    twice = next((one for one in pairs if pairs.count(one) > 1), None)
    if twice is not None:
        raise ConfigError(f"the pair {list(twice)} stands there twice: it would count double; leave one out")
    return pairs


def _suggest_layer_map(rule: str) -> str:
    said = suggest_choices(rule, (UNIFORM, "last_1"))
    return f"{said}, last_2 and so on, or a list of pairs [student's layer, teacher's layer]"


def _parse_layer_pair(number: int, value: Any) -> LayerPair:
    whole = isinstance(value, list | tuple) and all(type(one) is int and one >= 0 for one in value)
    if not whole or len(value) != 2:
        raise ConfigError(
            f"pair {number} is {value!r}: give two layers, numbers from 0: [student's, teacher's], as [1, 2]"
        )
    return value[0], value[1]


def resolve_layer_pairs(
    layers: LayerMap, student_layers: int, teacher_layers: int, *, lowest_layer: int = 0
) -> tuple[LayerPair, ...]:
    """The pairs that a map means for models of so many layers; the lowest that a pair may name is `first`.

    `uniform`: layer i of n with layer ceil(i m / n) of the teacher's m, which is TinyBERT's m / n i (Jiao et
    al. 2020, section 3.2) and PKD-Skip (Sun et al. 2019) where n divides m. `last_k`: the last k of both in
    their order (PKD-Last).

    Raises:
        SpecError: for a layer that one of them does not have, and for more layers than there are.
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


def _pair_last_layers(count: int, student: int, teacher: int) -> tuple[LayerPair, ...]:
    role, most = ("student", student) if student <= teacher else ("teacher", teacher)
    if count > most:
        raise ConfigError(
            f"last_{count}: there are {most} layers in the {role}; the nearest rule is last_{most}"
        )
    return tuple((student - n, teacher - n) for n in reversed(range(count)))


def _check_layer_exists(role: str, layer: int, first: int, last: int, pair: LayerPair) -> None:
    if first <= layer <= last:
        return
    close = first if layer < first else last
    raise ConfigError(
        f"layer {layer} of the {role}, in the pair {list(pair)}: it has the layers {first} to {last}; "
        f"the nearest is {close}"
    )


def _validate_layer_map(value: Any) -> Any:
    """Pydantic's form of the error, which says where in a file the value stands."""
    try:
        return parse_layer_map(value)
    except ConfigError as error:
        raise PydanticCustomError("layer_map", "{reason}", {"reason": str(error)}) from error


LayerRule = Annotated[str, Field(pattern=r"^(uniform|last_[1-9][0-9]*)$")]
LayerPairs = Annotated[tuple[tuple[NonNegativeInt, NonNegativeInt], ...], Field(min_length=1)]
LayerMapField = Annotated[LayerRule | LayerPairs, BeforeValidator(_validate_layer_map)]
"""The field of an experiment."""
