"""Methods by name, several loss terms, and teacher-written text."""

from typing import Any

import pytest

from gkd_lab.config.artifact_specs import TeacherText
from gkd_lab.config.loss_terms import CrossEntropyConfig, ResolvedDivergence
from gkd_lab.config.packs import group_cells_into_packs
from gkd_lab.config.settings import METHODS

from .stub import get_refusal, make_cell, make_grid

IN_OUR_TERMS: dict[str, dict[str, Any]] = {
    "gkd": {"lmbda": 0.25, "beta": 0.1},
    "gkd_supervised": {"lmbda": 0, "beta": 0.1},
    "supervised_kd": {"lmbda": 0, "beta": 0},
    "on_policy_kd": {"lmbda": 1, "beta": 0},
    "imitkd": {"lmbda": 0.5, "beta": 0},
    "f_distill": {"lmbda": 0.5, "divergence": "tv"},
    "seqkd": {"source": {"lmbda": 0, "text": {}}, "objectives": [{"type": "cross_entropy"}]},
    "sft": {"source": {"lmbda": 0}, "objectives": [{"type": "cross_entropy"}]},
    "rlef": {"lmbda": 1, "beta": 0.1, "anchor": "start", "alpha": 0.05},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_baseline_is_the_cell_that_its_definition_describes(method: str) -> None:
    reward = {"reward": "exact_match"} if "alpha" in METHODS[method] else {}
    training = make_cell(method=method, lmbda=0.25, beta=0.1, **reward).training
    assert training == make_cell(**IN_OUR_TERMS[method], **reward).training


def test_methods_are_an_axis_and_ignored_settings_collapse() -> None:
    grid = make_grid(grid={"method": ["gkd", "seqkd", "imitkd"], "beta": [0, 0.5, 1], "lmbda": [1]})
    assert [cell.labels["method"] for cell in grid.cells] == ["gkd"] * 3 + ["seqkd", "imitkd"]
    assert [len(points) for points in grid.stands_for.values()] == [3, 3]


def test_source_teacher_is_short_for_sampled_teacher_text() -> None:
    cell = make_cell(source="teacher", lmbda=0.5, beta=0.1)
    assert cell.training.source.text == TeacherText(decoding="sample", temperature=1)
    assert cell.training.text_spec is not None
    assert cell.training.text_spec.teacher == cell.training.teacher
    assert cell.fingerprint != make_cell(lmbda=0.5, beta=0.1).fingerprint
    assert make_cell(source="data", lmbda=0.5).training == make_cell(lmbda=0.5).training


def test_teacher_text_is_dropped_at_lmbda_1() -> None:
    assert make_cell(source="teacher", lmbda=1).training == make_cell(lmbda=1).training


def test_teacher_text_drops_fields_that_its_decoding_ignores() -> None:
    assert TeacherText(decoding="greedy", temperature=3, num_beams=2) == TeacherText(decoding="greedy")
    assert TeacherText(decoding="beam").num_beams == 4
    assert TeacherText(decoding="beam", num_beams=2) != TeacherText(decoding="beam")
    assert TeacherText(decoding="greedy", length_penalty_form="wu") == TeacherText(decoding="greedy")
    assert TeacherText(decoding="beam", length_penalty_form="wu") != TeacherText(decoding="beam")


def test_listed_terms_have_weights_and_default_temperatures() -> None:
    listed = [{"type": "divergence", "beta": 0.1, "weight": 2}, {"type": "cross_entropy", "weight": 0.5}]
    cell = make_cell(objectives=listed, teacher_temperature=0.3, source={"lmbda": 0.5})
    assert cell.training.objectives == (
        ResolvedDivergence(beta=0.1, weight=2, teacher_temperature=0.3, student_temperature=1),
        CrossEntropyConfig(weight=0.5),
    )
    assert (cell.beta, cell.divergence) == (0.1, "jsd")


def test_objectives_are_an_axis() -> None:
    lists = [[{"beta": 0}], [{"beta": 0}, {"type": "cross_entropy", "weight": 0.5}]]
    assert [len(cell.training.objectives) for cell in make_grid(grid={"objectives": lists}).cells] == [1, 2]


def test_cells_with_other_teacher_text_are_not_packed_together() -> None:
    cells = make_grid(grid={"method": ["seqkd", "sft", "supervised_kd"]}).cells
    made = [{cell.labels["method"] for cell in pack} for pack in group_cells_into_packs(cells, "auto")]
    assert made == [{"seqkd"}, {"sft", "supervised_kd"}]


def test_train_rows_does_not_change_reference_models() -> None:
    few, every = make_cell(train_rows=10), make_cell()
    assert few.training.train_rows == 10
    assert (few.training.teacher, few.training.start) == (every.training.teacher, every.training.start)
    assert few.fingerprint != every.fingerprint
    assert make_cell(train_rows=100).training == make_cell(train_rows=1000).training == every.training


def test_the_folder_names_the_source_of_the_text() -> None:
    assert "lmbda=0_cross_entropy_teacher-text_seed=0-" in make_cell(method="seqkd").folder
    assert "lmbda=0_cross_entropy_seed=0-" in make_cell(method="sft").folder


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"objectives": [{"type": "cross_entropy"}], "lmbda": 1}, "lmbda 1 lets"),
        ({"method": "sft", "source": {"lmbda": 0}}, "source and method"),
        ({"source": "students"}, "source: 'students'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(document: dict[str, Any], expected: str) -> None:
    assert expected in get_refusal(**document)
