"""Cells with `implementation: trl`: identity, what collapses, and what TRL cannot do."""

from typing import Any

import pytest

from gkd_lab.config import trl_cells
from gkd_lab.config.packs import group_cells_into_packs

from .stub import get_refusal, make_cell, make_grid

TRL = {"implementation": "trl"}


def test_our_own_implementation_leaves_the_fingerprint_as_it_was() -> None:
    cell = make_cell(implementation="gkd_lab")
    assert cell.full_fingerprint == make_cell().full_fingerprint
    assert "implementation" not in cell.training.canonical_json
    assert "trl" not in cell.training.canonical_json


def test_trl_and_its_version_are_part_of_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = make_cell(**TRL)
    assert cell.full_fingerprint != make_cell().full_fingerprint
    assert cell.full_fingerprint != make_cell(loss_normalization="token").full_fingerprint
    assert cell.training.trl_version == trl_cells.get_trl_version()
    assert "_trl_" in cell.folder
    monkeypatch.setattr(trl_cells, "get_trl_version", lambda: "99.0")
    assert make_cell(**TRL).full_fingerprint != cell.full_fingerprint


def test_trl_means_over_tokens_unless_the_experiment_states_another_mean() -> None:
    assert make_cell(**TRL).training.loss_normalization == "token"
    assert make_cell(**TRL, loss_normalization="token").fingerprint == make_cell(**TRL).fingerprint
    message = get_refusal(**TRL, loss_normalization="sequence")
    assert "loss_normalization sequence" in message and "leave loss_normalization out" in message


def test_the_axis_crosses_and_every_cell_of_trl_is_a_pack_of_its_own() -> None:
    grid = make_grid(grid={"implementation": ["gkd_lab", "trl"], "lmbda": [0, 1], "beta": [0, 0.5]})
    assert [cell.labels["implementation"] for cell in grid.cells] == ["gkd_lab"] * 4 + ["trl"] * 4
    packs = group_cells_into_packs(grid.cells, "auto")
    assert sorted((pack[0].training.implementation, len(pack)) for pack in packs) == [
        ("gkd_lab", 4),
        *[("trl", 1)] * 4,
    ]


def test_cells_of_trl_that_cannot_differ_are_one() -> None:
    grid = make_grid(grid={"implementation": ["trl"], "lmbda": [0, 1], "temperature": [0.5, 1]})
    assert len(grid.cells) == 3  # without sampling its temperature has no effect
    objectives = [{"beta": 0.5}]
    assert make_cell(**TRL, objectives=objectives).fingerprint == make_cell(**TRL, beta=0.5).fingerprint


@pytest.mark.parametrize(
    ("changes", "field", "remedy"),
    [
        ({"task": "words"}, "encoder-decoder", "decoder-only"),
        ({"method": "sft"}, "cross_entropy", "leave objectives, method and reward out"),
        ({"method": "seqkd"}, "source teacher", "method out"),
        ({"source": "teacher", "lmbda": 0}, "source teacher", "source: teacher"),
        ({"source": {"lmbda": 0, "corrupted": {"share": 0.1, "samples": 2}}}, "corrupted", "leave"),
        ({"teacher_scores": "full", "lmbda": 0}, "teacher_scores", "leave teacher_scores out"),
        ({"divergence": "tv"}, "divergence tv", "divergence: jsd"),
        ({"rescale_divergence": True, "beta": 0.5}, "rescale_divergence", "leave"),
        ({"teacher_temperature": 0.5}, "teacher_temperature 0.5", "set teacher_temperature: 1"),
        ({"student_temperature": 2}, "student_temperature 2", "set student_temperature: 1"),
        ({"objectives": [{"beta": 0}, {"type": "cross_entropy"}]}, "cross_entropy", "one divergence"),
        ({"objectives": [{"beta": 0}, {"beta": 1}]}, "2 terms", "keep one"),
        ({"objectives": [{"beta": 0, "weight": 2}]}, "weight 2", "leave"),
        ({"reward": "exact_match", "alpha": 0.5}, "reward", "one divergence"),
        (
            {"teachers": {"b": "small"}, "objectives": [{"beta": 0, "teachers": ["teacher", "b"]}]},
            "teachers",
            "leave teachers out",
        ),
        ({"teacher": {"size": "large", "dtype": "bfloat16"}}, "teacher.dtype", "leave teacher.dtype out"),
        ({"teacher": {"size": "large", "parked": True}}, "teacher.parked", "leave teacher.parked out"),
        (
            {"teacher_tokenizer": {"kind": "bpe"}, "objectives": [{"type": "uld"}]},
            "teacher_tokenizer",
            "leave teacher_tokenizer out",
        ),
        (
            {"teacher": {"server": "http://127.0.0.1:8000/v1", "model": "m", "top_k": 20}},
            "teacher.server",
            "leave teacher.server out",
        ),
    ],
)
def test_what_trl_cannot_do_is_refused(changes: dict[str, Any], field: str, remedy: str) -> None:
    make_grid(**changes)  # gkd_lab can
    message = get_refusal(**TRL, **changes)
    assert message.startswith("implementation trl: ")
    assert field in message and remedy in message


def test_an_unknown_implementation_is_refused_with_the_valid_ones() -> None:
    message = get_refusal(implementation="tlr")
    assert "implementation" in message and "gkd_lab" in message and "trl" in message
