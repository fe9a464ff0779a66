"""A teacher with a tokenizer of its own: how it is said, and which losses can be had then."""

from typing import Any

import pytest

from gkd_lab.config.artifact_specs import TokenizerSpec
from gkd_lab.config.loss_terms import CrossEntropyConfig, ULDConfig

from .stub import get_refusal, make_cell, make_grid

PIECES = {"kind": "bpe", "vocab_size": 300}
ULD = [{"type": "cross_entropy", "weight": 0.5}, {"type": "uld", "teacher_temperature": 2}]


def test_a_teacher_may_have_a_tokenizer_of_its_own() -> None:
    one = make_cell(teacher_tokenizer=PIECES, objectives=ULD, lmbda=0.5).training
    assert one.teacher.tokenizer == TokenizerSpec(kind="bpe", vocab_size=300)
    assert one.start.tokenizer == TokenizerSpec(kind="word", vocab_size=64)
    assert one.objectives == (CrossEntropyConfig(weight=0.5), ULDConfig(teacher_temperature=2))


def test_the_same_tokenizer_said_twice_is_the_same_cell() -> None:
    said = {"kind": "word", "vocab_size": 64}
    assert make_cell(teacher_tokenizer=said).fingerprint == make_cell().fingerprint
    assert make_cell(teacher_tokenizer={"vocab_size": 64}).fingerprint == make_cell().fingerprint


def test_what_it_leaves_out_besides_its_kind_is_its_own_default() -> None:
    one = make_cell(teacher_tokenizer={"kind": "bpe"}, objectives=ULD, lmbda=0)
    assert one.training.teacher.tokenizer.vocab_size is None


def test_its_size_is_an_axis() -> None:
    axis = {"teacher_tokenizer.vocab_size": [300, 400]}
    found = make_grid(objectives=ULD, lmbda=0, grid=axis, teacher_tokenizer={"kind": "bpe"})
    assert [one.training.teacher.tokenizer.vocab_size for one in found.cells] == [300, 400]


@pytest.mark.parametrize("method", ["sft", "seqkd"])
def test_text_alone_needs_no_common_tokens(method: str) -> None:
    assert make_cell(teacher_tokenizer=PIECES, method=method).training.teacher.tokenizer.kind == "bpe"


def test_a_divergence_from_the_student_s_own_start_is_in_its_own_tokens() -> None:
    listed = [{"type": "uld"}, {"beta": 0, "teacher": "start", "weight": 0.1}]
    assert len(make_cell(teacher_tokenizer=PIECES, objectives=listed).training.objectives) == 2


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({}, "divergence compares teacher and student token by token"),
        ({"objectives": [{"type": "uld"}, {"beta": 0}]}, "(bpe, 300 entries) is not the student's (word, 64"),
        ({}, "objectives: [{type: uld}, {type: cross_entropy}]"),
        (
            {"objectives": [{"type": "hidden_states", "layers": [[0, 1]]}]},
            "[{type: uld}, {type: cross_entropy}]",
        ),
        ({"teacher_tokenizer": {"kind": "bpe", "vocab_size": 99}}, "teacher_tokenizer.vocab_size: 99 is too"),
        ({"objectives": [{"type": "uld", "beta": 0}]}, "unknown field 'objectives[0].beta'"),
        ({"objectives": [{"type": "uld", "teacher_temperature": 0}]}, "must be more than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(document: dict[str, Any], said: str) -> None:
    assert said in get_refusal(**{"teacher_tokenizer": PIECES, **document})
