"""Baselines by name, several objectives, and text that the teacher writes: all in one form."""

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
    more = {"reward": "exact_match"} if "alpha" in METHODS[method] else {}
    one = make_cell(method=method, lmbda=0.25, beta=0.1, **more).training
    assert one == make_cell(**IN_OUR_TERMS[method], **more).training


def test_methods_are_an_axis_and_what_a_method_does_not_read_collapses() -> None:
    found = make_grid(grid={"method": ["gkd", "seqkd", "imitkd"], "beta": [0, 0.5, 1], "lmbda": [1]})
    assert [one.labels["method"] for one in found.cells] == ["gkd"] * 3 + ["seqkd", "imitkd"]
    assert [len(points) for points in found.stands_for.values()] == [3, 3]


def test_the_source_can_be_the_teacher_in_one_word() -> None:
    one = make_cell(source="teacher", lmbda=0.5, beta=0.1)
    assert one.training.source.text == TeacherText(decoding="sample", temperature=1)
    assert one.training.text_spec is not None
    assert one.training.text_spec.teacher == one.training.teacher
    assert one.fingerprint != make_cell(lmbda=0.5, beta=0.1).fingerprint
    assert make_cell(source="data", lmbda=0.5).training == make_cell(lmbda=0.5).training


def test_where_the_student_always_writes_the_teacher_s_text_is_not_asked_for() -> None:
    assert make_cell(source="teacher", lmbda=1).training == make_cell(lmbda=1).training


def test_what_a_way_of_writing_does_not_read_is_not_part_of_it() -> None:
    assert TeacherText(decoding="greedy", temperature=3, num_beams=2) == TeacherText(decoding="greedy")
    assert TeacherText(decoding="beam").num_beams == 4
    assert TeacherText(decoding="beam", num_beams=2) != TeacherText(decoding="beam")


def test_objectives_are_listed_with_weights_and_take_the_temperatures_that_hold_besides() -> None:
    listed = [{"type": "divergence", "beta": 0.1, "weight": 2}, {"type": "cross_entropy", "weight": 0.5}]
    one = make_cell(objectives=listed, teacher_temperature=0.3, source={"lmbda": 0.5})
    assert one.training.objectives == (
        ResolvedDivergence(beta=0.1, weight=2, teacher_temperature=0.3, student_temperature=1),
        CrossEntropyConfig(weight=0.5),
    )
    assert (one.beta, one.divergence) == (0.1, "jsd")


def test_objectives_are_an_axis() -> None:
    lists = [[{"beta": 0}], [{"beta": 0}, {"type": "cross_entropy", "weight": 0.5}]]
    assert [len(one.training.objectives) for one in make_grid(grid={"objectives": lists}).cells] == [1, 2]


def test_cells_whose_rows_somebody_else_wrote_do_not_share_a_model() -> None:
    found = make_grid(grid={"method": ["seqkd", "sft", "supervised_kd"]}).cells
    made = [{one.labels["method"] for one in pack} for pack in group_cells_into_packs(found, "auto")]
    assert made == [{"seqkd"}, {"sft", "supervised_kd"}]


def test_fewer_rows_to_distil_on_leave_teacher_and_start_as_they_are() -> None:
    few, every = make_cell(train_rows=10), make_cell()
    assert few.training.train_rows == 10
    assert (few.training.teacher, few.training.start) == (every.training.teacher, every.training.start)
    assert few.fingerprint != every.fingerprint
    assert make_cell(train_rows=100).training == make_cell(train_rows=1000).training == every.training


def test_the_folder_says_what_was_learnt_from() -> None:
    assert "lmbda=0_cross_entropy_teacher-text_seed=0-" in make_cell(method="seqkd").folder
    assert "lmbda=0_cross_entropy_seed=0-" in make_cell(method="sft").folder


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"objectives": [{"type": "cross_entropy"}], "lmbda": 1}, "lmbda 1 lets the student write"),
        ({"method": "sft", "source": {"lmbda": 0}}, "source and method"),
        ({"source": "students"}, "source: 'students' is not valid: "),
    ],
)
def test_what_makes_no_sense_is_refused(document: dict[str, Any], said: str) -> None:
    assert said in get_refusal(**document)
