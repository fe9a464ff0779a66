"""Checks of cells: layers, tokenizers and classifiers that do not fit together are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gkd_lab import experiments
from gkd_lab.config.artifact_specs import TokenizerSpec
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.loss_terms import (
    AttentionsConfig,
    CrossEntropyConfig,
    HiddenStatesConfig,
    SquaredErrorConfig,
    ULDConfig,
)

from .stub import get_refusal, make_cell, make_grid

# ---- layers ----


def objectives(**fields: Any) -> dict[str, Any]:
    return {"objectives": [{"beta": 0}, {"type": "hidden_states", **fields}]}


def test_an_experiment_states_a_layer_map_as_rule_or_list() -> None:
    by_rule = make_cell(**objectives(loss="cosine", weight=0.5)).training.objectives[1]
    assert by_rule == HiddenStatesConfig(layers="uniform", loss="cosine", weight=0.5)
    by_list = make_cell(**objectives(layers=[[0, 0], [1, 1]])).training.objectives[1]
    assert by_list == HiddenStatesConfig(layers=((0, 0), (1, 1)))
    assert make_cell(**objectives()).fingerprint != make_cell(**objectives(layers="last_1")).fingerprint
    maps = make_cell(objectives=[{"beta": 0}, {"type": "attentions", "loss": "kl"}]).training.objectives[1]
    assert maps == AttentionsConfig(loss="kl")


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (objectives(layers=[[2, 2]]), "layer 2"),
        (objectives(layers=[[1, 3]]), "layer 3"),
        (
            objectives(layers="last_2"),
            "last_1",
        ),
        (
            objectives(stack="encoder"),
            "stack 'encoder'",
        ),
        (objectives(loss="mae"), "'mse'"),
        (objectives(layer="last_1"), "did you mean 'layers'?"),
        (
            {"objectives": [{"type": "attentions", "layers": [[0, 1]]}]},
            "attentions: layer 0",
        ),
        (
            {"objectives": [{"type": "attentions"}], "precision": "fp64"},
            "precision 'fp64'",
        ),
    ],
)
def test_layers_that_the_models_lack_are_refused(document: dict[str, Any], expected: str) -> None:
    assert expected in get_refusal(**document)


def test_both_stacks_of_an_encoder_decoder_can_be_matched() -> None:
    cells = [make_cell(task="words", **objectives(stack=stack)) for stack in ("encoder", "decoder")]
    assert cells[0].fingerprint != cells[1].fingerprint


def test_without_a_local_checkpoint_only_kept_layers_are_checked() -> None:
    """Layers of a hub model are not checked, unless `keep_layers` states how many there are."""
    loaded: dict[str, Any] = {"teacher": {"pretrained": "org/large"}}
    make_cell(**loaded, **objectives(layers=[[1, 40]]))
    assert "layer 2 of the student" in get_refusal(**loaded, **objectives(layers=[[2, 40]]))
    assert "student is 1" in get_refusal(**loaded, **objectives(layers="last_2"))
    settings = {"teacher": {"pretrained": "org/large", "keep_layers": [0, 5, 9]}}
    make_cell(**settings, **objectives(layers=[[1, 3]]))
    assert "layer 4 of the teacher" in get_refusal(**settings, **objectives(layers=[[1, 4]]))


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
def test_the_depth_of_a_checkpoint_folder_is_checked(
    task: str, stack: str, config: dict[str, int], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings: dict[str, Any] = {"task": task, "teacher": {"pretrained": str(tmp_path)}}
    make_cell(**settings, **objectives(stack=stack, layers=[[1, 6]]))
    message = get_refusal(**settings, **objectives(stack=stack, layers=[[1, 7]]))
    assert "layer 7 of the teacher" in message and "0 to 6" in message


@pytest.mark.parametrize("text", ("", "[1]", '{"layers": "many"}'))
def test_a_checkpoint_without_a_stated_depth_is_accepted(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    cell = make_cell(teacher={"pretrained": str(tmp_path)}, **objectives(layers=[[1, 40]]))
    assert cell.training.objectives[1].layers == ((1, 40),)  # type: ignore[union-attr]


# ---- tokenizers ----

PIECES = {"kind": "bpe", "vocab_size": 300}
ULD = [{"type": "cross_entropy", "weight": 0.5}, {"type": "uld", "teacher_temperature": 2}]


def test_a_teacher_may_have_a_tokenizer_of_its_own() -> None:
    training = make_cell(teacher_tokenizer=PIECES, objectives=ULD, lmbda=0.5).training
    assert training.teacher.tokenizer == TokenizerSpec(kind="bpe", vocab_size=300)
    assert training.start.tokenizer == TokenizerSpec(kind="word", vocab_size=64)
    assert training.objectives == (CrossEntropyConfig(weight=0.5), ULDConfig(teacher_temperature=2))


def test_stating_the_student_s_tokenizer_does_not_change_the_cell() -> None:
    tokenizer = {"kind": "word", "vocab_size": 64}
    assert make_cell(teacher_tokenizer=tokenizer).fingerprint == make_cell().fingerprint
    assert make_cell(teacher_tokenizer={"vocab_size": 64}).fingerprint == make_cell().fingerprint


def test_the_teacher_tokenizer_has_its_own_default_size() -> None:
    cell = make_cell(teacher_tokenizer={"kind": "bpe"}, objectives=ULD, lmbda=0)
    assert cell.training.teacher.tokenizer.vocab_size is None


def test_the_size_of_the_teacher_tokenizer_is_an_axis() -> None:
    axis = {"teacher_tokenizer.vocab_size": [300, 400]}
    grid = make_grid(objectives=ULD, lmbda=0, grid=axis, teacher_tokenizer={"kind": "bpe"})
    assert [cell.training.teacher.tokenizer.vocab_size for cell in grid.cells] == [300, 400]


@pytest.mark.parametrize("method", ["sft", "seqkd"])
def test_text_based_methods_allow_another_tokenizer(method: str) -> None:
    assert make_cell(teacher_tokenizer=PIECES, method=method).training.teacher.tokenizer.kind == "bpe"


def test_a_divergence_from_the_start_allows_another_teacher_tokenizer() -> None:
    listed = [{"type": "uld"}, {"beta": 0, "teacher": "start", "weight": 0.1}]
    assert len(make_cell(teacher_tokenizer=PIECES, objectives=listed).training.objectives) == 2


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({}, "divergence compares"),
        ({"objectives": [{"type": "uld"}, {"beta": 0}]}, "(bpe, 300 entries)"),
        ({}, "{type: uld}"),
        (
            {"objectives": [{"type": "hidden_states", "layers": [[0, 1]]}]},
            "[{type: uld}, {type: cross_entropy}]",
        ),
        ({"teacher_tokenizer": {"kind": "bpe", "vocab_size": 99}}, "teacher_tokenizer.vocab_size: 99 is too"),
        ({"objectives": [{"type": "uld", "beta": 0}]}, "unknown field 'objectives[0].beta'"),
        ({"objectives": [{"type": "uld", "teacher_temperature": 0}]}, "teacher_temperature: 0"),
    ],
)
def test_terms_that_compare_tokens_refuse_another_tokenizer(document: dict[str, Any], expected: str) -> None:
    assert expected in get_refusal(**{"teacher_tokenizer": PIECES, **document})


# ---- classifiers ----


def load_grid(folder: Path, **fields: Any) -> Any:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"description": "d", "task": "classification", **fields}))
    return experiments.load(str(path), outputs=folder)


def test_a_classifier_is_distilled_off_policy_by_default(tmp_path: Path) -> None:
    (cell,) = load_grid(tmp_path).cells
    assert (cell.lmbda, cell.training.start.family) == (0, "sequence-classification")
    assert cell.training.start.sft is None and cell.training.teacher.sft is not None
    (number,) = load_grid(tmp_path, task="scoring").cells
    assert number.training.objectives == (SquaredErrorConfig(),)
    assert "squared_error" in number.folder


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lmbda": 0.5}, "lmbda 0.5 .*classification"),
        ({"source": "teacher"}, "source teacher: .*classification"),
        ({"teacher_scores": "full"}, "teacher_scores: models of classification"),
        ({"student": "org/some-model"}, "classification .*scratch|revision"),
        (
            {"objectives": [{"beta": 0}, {"type": "hidden_states"}]},
            "hidden_states needs",
        ),
        (
            {"objectives": [{"type": "squared_error", "against": "labels"}]},
            "for classes choose cross_entropy",
        ),
        ({"task": "scoring", "objectives": [{"type": "cross_entropy"}]}, "cross_entropy .*regression"),
        ({"task": "scoring", "objectives": [{"beta": 0}]}, "divergence compares distributions"),
        ({"evaluations": [{"decoding": "sample"}]}, "decoding sample"),
        (
            {
                "task": "arithmetic",
                "lmbda": 0,
                "objectives": [{"type": "squared_error", "against": "labels"}],
            },
            "against labels .*regression",
        ),
    ],
)
def test_a_classifier_cell_refuses_text_generation_and_unfit_terms(
    tmp_path: Path, fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_grid(tmp_path, **fields)


def test_the_logits_of_a_language_model_can_be_matched(tmp_path: Path) -> None:
    (cell,) = load_grid(tmp_path, task="arithmetic", objectives=[{"type": "squared_error"}]).cells
    assert cell.training.objectives == (SquaredErrorConfig(against="teacher"),)
