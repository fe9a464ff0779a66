"""Layer maps: rules and lists resolve to pairs; invalid maps are refused."""

import re
from typing import Any

import pytest

from gkd_lab.config import ConfigError
from gkd_lab.config.layer_maps import LayerMap, LayerPair, parse_layer_map, resolve_layer_pairs

from .stub import get_refusal


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "pairs"),
    [
        ("uniform", 4, 12, ((1, 3), (2, 6), (3, 9), (4, 12))),  # TinyBERT's 4 layers of BERT base
        ("uniform", 6, 12, ((1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12))),  # PKD-Skip's, and the last
        ("uniform", 2, 2, ((1, 1), (2, 2))),
        ("uniform", 3, 4, ((1, 2), (2, 3), (3, 4))),
        ("uniform", 4, 2, ((1, 1), (2, 1), (3, 2), (4, 2))),
        ("last_2", 3, 6, ((2, 5), (3, 6))),
        ("last_3", 6, 3, ((4, 1), (5, 2), (6, 3))),
        (((0, 0), (2, 6)), 2, 6, ((0, 0), (2, 6))),
        (((2, 1), (2, 6), (1, 6)), 2, 6, ((2, 1), (2, 6), (1, 6))),
    ],
)
def test_a_layer_map_resolves_to_pairs(
    layers: LayerMap, student: int, teacher: int, pairs: tuple[LayerPair, ...]
) -> None:
    assert resolve_layer_pairs(layers, student, teacher) == pairs


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("last_9", "last_9: .*last_4"),
        (((5, 1),), "layer 5.*student.*is 4"),
        (((1, 9),), "layer 9.*teacher.*is 8"),
    ],
)
def test_a_missing_layer_is_reported(layers: LayerMap, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        resolve_layer_pairs(layers, 4, 8)


def test_last_k_is_bounded_by_the_shallower_model() -> None:
    with pytest.raises(ConfigError, match=r"last_5.* 2; .*last_2"):
        resolve_layer_pairs("last_5", 4, 2)


def test_the_lowest_layer_of_a_map_can_be_1() -> None:
    with pytest.raises(ConfigError, match=r"layer 0 .* 1 to 4; .* 1"):
        resolve_layer_pairs(((0, 0),), 4, 8, lowest_layer=1)


WRONG: list[tuple[Any, str]] = [
    ("unifrm", "'unifrm' .*'uniform'"),
    ("last_0", "'last_0' .*'last_1'"),
    ("last", "'last' .*'last_1'"),
    ([], r"\[\] is neither a rule"),
    (3, "3 is neither a rule"),
    ([[1, 2], [3]], r"pair 2 is \[3\]"),
    ([[1, 2, 3]], r"1 is \[1, 2, 3\]"),
    ([1, 2], "pair 1 is 1"),
    ([[1, "x"]], r"1 is \[1, 'x'\]"),
    ([[1, -1]], r"1 is \[1, -1\]"),
    ([[1, True]], r"1 is \[1, True\]"),
    ([[1, 2], [1, 2]], r"pair \[1, 2\] .*twice"),
]


@pytest.mark.parametrize(("layers", "expected"), WRONG)
def test_an_invalid_layer_map_is_refused(layers: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_layer_map(layers)
    message = get_refusal(objectives=[{"beta": 0}, {"type": "hidden_states", "layers": layers}])
    assert re.search(rf"^stub.yaml: objectives\[1\].layers: .* is not valid: .*{expected}", message), message
