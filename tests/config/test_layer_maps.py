"""Which layers are matched: rules and lists, and what is wrong with those that no model can follow."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import ConfigError
from gkd_lab.config.layer_maps import LayerMap, LayerPair, parse_layer_map, resolve_layer_pairs
from gkd_lab.config.loss_terms import AttentionsConfig, HiddenStatesConfig

from .stub import get_refusal, make_cell


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
def test_a_map_means_pairs(
    layers: LayerMap, student: int, teacher: int, pairs: tuple[LayerPair, ...]
) -> None:
    assert resolve_layer_pairs(layers, student, teacher) == pairs


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("last_9", "last_9: .* student is 4; the nearest rule is last_4"),
        (((5, 1),), r"layer 5 of the student, in the pair \[5, 1\]: .* 0 to 4; .* is 4"),
        (((1, 9),), r"layer 9 of the teacher, in the pair \[1, 9\]: .* 0 to 8; .* is 8"),
    ],
)
def test_a_layer_that_is_not_there_is_named(layers: LayerMap, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_layer_pairs(layers, 4, 8)


def test_the_shallower_model_bounds_the_last_layers() -> None:
    with pytest.raises(ConfigError, match=r"last_5: .* teacher is 2; the nearest rule is last_2"):
        resolve_layer_pairs("last_5", 4, 2)


def test_a_map_of_attention_starts_at_the_first_layer() -> None:
    with pytest.raises(ConfigError, match=r"layer 0 of the student, .* 1 to 4; the nearest is 1"):
        resolve_layer_pairs(((0, 0),), 4, 8, lowest_layer=1)


WRONG: list[tuple[Any, str]] = [
    ("unifrm", "'unifrm' is not a rule; did you mean 'uniform'"),
    ("last_0", "'last_0' is not a rule; did you mean 'last_1'"),
    ("last", "'last' is not a rule; did you mean 'last_1'"),
    ([], r"\[\] is neither a rule"),
    (3, "3 is neither a rule"),
    ([[1, 2], [3]], r"pair 2 is \[3\]: give two layers"),
    ([[1, 2, 3]], r"pair 1 is \[1, 2, 3\]: give two layers"),
    ([1, 2], "pair 1 is 1: give two layers"),
    ([[1, "x"]], r"pair 1 is \[1, 'x'\]: give two layers"),
    ([[1, -1]], r"pair 1 is \[1, -1\]: give two layers from 0"),
    ([[1, True]], r"pair 1 is \[1, True\]: give two layers"),
    ([[1, 2], [1, 2]], r"the pair \[1, 2\] is listed twice"),
]


@pytest.mark.parametrize(("layers", "said"), WRONG)
def test_what_is_no_map_is_refused_in_a_configuration_and_in_an_experiment(layers: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_layer_map(layers)
    message = get_refusal(objectives=[{"beta": 0}, {"type": "hidden_states", "layers": layers}])
    assert re.search(rf"^stub.yaml: objectives\[1\].layers: .* is not valid: .*{said}", message), message


# ---- in an experiment ----


def objectives(**fields: Any) -> dict[str, Any]:
    return {"objectives": [{"beta": 0}, {"type": "hidden_states", **fields}]}


def test_an_experiment_states_a_map_in_either_form() -> None:
    by_rule = make_cell(**objectives(loss="cosine", weight=0.5)).training.objectives[1]
    assert by_rule == HiddenStatesConfig(layers="uniform", loss="cosine", weight=0.5)
    by_list = make_cell(**objectives(layers=[[0, 0], [1, 1]])).training.objectives[1]
    assert by_list == HiddenStatesConfig(layers=((0, 0), (1, 1)))
    assert make_cell(**objectives()).fingerprint != make_cell(**objectives(layers="last_1")).fingerprint
    maps = make_cell(objectives=[{"beta": 0}, {"type": "attentions", "loss": "kl"}]).training.objectives[1]
    assert maps == AttentionsConfig(loss="kl")


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (objectives(layers=[[2, 2]]), "layer 2 of the student, in the pair [2, 2]: valid layers are 0 to 1"),
        (objectives(layers=[[1, 3]]), "layer 3 of the teacher, in the pair [1, 3]: valid layers are 0 to 2"),
        (
            objectives(layers="last_2"),
            "student is 1; the nearest rule is last_1",
        ),
        (
            objectives(stack="encoder"),
            "stack 'encoder': the models have one stack; the nearest valid value",
        ),
        (objectives(loss="mae"), "did you mean 'mse'? valid: mse, cosine"),
        (objectives(layer="last_1"), "did you mean 'layers'?"),
        (
            {"objectives": [{"type": "attentions", "layers": [[0, 1]]}]},
            "objectives: attentions: layer 0 of the student, in the pair [0, 1]: valid layers are 1 to 1",
        ),
        (
            {"objectives": [{"type": "attentions"}], "precision": "fp64"},
            "precision 'fp64'",
        ),
    ],
)
def test_what_models_to_be_made_do_not_have_is_refused_before_anything_runs(
    document: dict[str, Any], said: str
) -> None:
    assert said in get_refusal(**document)


def test_both_stacks_of_an_encoder_decoder_can_be_matched() -> None:
    found = [make_cell(task="words", **objectives(stack=stack)) for stack in ("encoder", "decoder")]
    assert found[0].fingerprint != found[1].fingerprint


def test_of_a_checkpoint_only_what_is_stated_is_known() -> None:
    """The layers that are kept; of the other model every layer may be there."""
    loaded: dict[str, Any] = {"teacher": {"pretrained": "org/large"}}
    make_cell(**loaded, **objectives(layers=[[1, 40]]))
    assert "layer 2 of the student" in get_refusal(**loaded, **objectives(layers=[[2, 40]]))
    assert "last_2: the depth of the student is 1" in get_refusal(**loaded, **objectives(layers="last_2"))
    kept = {"teacher": {"pretrained": "org/large", "keep_layers": [0, 5, 9]}}
    make_cell(**kept, **objectives(layers=[[1, 3]]))
    assert "layer 4 of the teacher" in get_refusal(**kept, **objectives(layers=[[1, 4]]))


@pytest.mark.parametrize(
    ("task", "stack", "config"),
    [
        ("sums", "decoder", {"num_hidden_layers": 6}),
        ("sums", "decoder", {"n_layer": 6}),  # GPT-2
        ("words", "decoder", {"num_layers": 4, "num_decoder_layers": 6}),  # T5
        ("words", "encoder", {"num_layers": 6, "num_decoder_layers": 4}),
        ("words", "encoder", {"num_hidden_layers": 4, "encoder_layers": 6}),  # BART
    ],
)
def test_what_a_folder_says_of_its_depth_is_known(
    task: str, stack: str, config: dict[str, int], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked: dict[str, Any] = {"task": task, "teacher": {"pretrained": str(tmp_path)}}
    make_cell(**asked, **objectives(stack=stack, layers=[[1, 6]]))
    said = get_refusal(**asked, **objectives(stack=stack, layers=[[1, 7]]))
    assert "layer 7 of the teacher, in the pair [1, 7]: valid layers are 0 to 6" in said


@pytest.mark.parametrize("text", ("", "[1]", '{"layers": "many"}'))
def test_a_configuration_that_says_nothing_of_it_is_left_to_the_loading(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    one = make_cell(teacher={"pretrained": str(tmp_path)}, **objectives(layers=[[1, 40]]))
    assert one.training.objectives[1].layers == ((1, 40),)  # type: ignore[union-attr]
