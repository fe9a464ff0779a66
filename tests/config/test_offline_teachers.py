"""Kept scores and served teachers, as an experiment states them."""

from typing import Any

import pytest

from gkd_lab.config.artifact_specs import TeacherScores
from gkd_lab.config.cell import list_references
from gkd_lab.config.packs import group_cells_into_packs

from .stub import get_refusal, make_cell, make_grid

SERVER: dict[str, Any] = {"server": "http://127.0.0.1:8000/v1", "model": "large", "top_k": 20}


def test_scores_are_kept_in_one_word_or_with_their_number() -> None:
    assert make_cell(lmbda=0, teacher_scores="full").training.teacher_scores == TeacherScores()
    assert make_cell(lmbda=0, teacher_scores={"top_k": 8}).training.teacher_scores == TeacherScores(top_k=8)
    assert make_cell(lmbda=0, teacher_scores="live").training == make_cell(lmbda=0).training


def test_what_is_kept_is_part_of_the_identity() -> None:
    asked = ["live", "full", {"top_k": 8}, {"top_k": 8, "dtype": "float16"}]
    found = make_grid(lmbda=0, grid={"teacher_scores": asked}).cells
    assert len({one.fingerprint for one in found}) == 4
    assert len({one.training.scores_spec.fingerprint for one in found[1:] if one.training.scores_spec}) == 3
    assert "_scores-top8_seed=0-" in found[2].folder


def test_cells_share_scores_whatever_else_they_differ_in() -> None:
    axes = {"beta": [0, 0.5], "seed": [0, 1], "train_rows": [8, 16], "student": ["small", "large"]}
    found = make_grid(lmbda=0, teacher_scores={"top_k": 8}, grid=axes).cells
    assert len(found) == 16
    assert len({one.training.scores_spec.fingerprint for one in found if one.training.scores_spec}) == 1


def test_scores_are_of_the_text_that_is_trained_on() -> None:
    of_data = make_cell(lmbda=0, teacher_scores="full").training.scores_spec
    of_text = make_cell(source="teacher", lmbda=0, teacher_scores="full").training.scores_spec
    assert of_data is not None and of_text is not None
    assert (of_data.text_spec, of_data.fingerprint != of_text.fingerprint) == (None, True)
    assert of_text.text_spec == make_cell(source="teacher", lmbda=0).training.text_spec


def test_where_no_divergence_reads_a_teacher_nothing_is_kept() -> None:
    assert make_cell(method="sft", teacher_scores="full").training == make_cell(method="sft").training


def test_cells_with_and_without_kept_scores_do_not_share_a_model() -> None:
    found = make_grid(lmbda=0, grid={"teacher_scores": ["live", "full"], "beta": [0, 0.5]}).cells
    made = [{one.labels["teacher_scores"] for one in pack} for pack in group_cells_into_packs(found, "auto")]
    assert made == [{"live"}, {"full"}]


def test_a_served_teacher_is_known_by_its_name_and_what_is_read_of_it() -> None:
    one = make_cell(teacher=SERVER)
    assert one.training.teacher.model.served == "large"
    elsewhere = {**SERVER, "server": "https://cluster:8443/v1", "patience": 5}
    assert make_cell(teacher=elsewhere).fingerprint == one.fingerprint
    for changed in ({"model": "larger"}, {"top_k": 8}):
        assert make_cell(teacher={**SERVER, **changed}).fingerprint != one.fingerprint


def test_a_served_teacher_is_no_model_to_be_built() -> None:
    assert [one.role for one in list_references([make_cell(teacher=SERVER)])] == ["start"]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (
            {"lmbda": 0.5, "teacher_scores": "full"},
            "lmbda 0.5",
        ),
        ({"lmbda": 0, "teacher_scores": "ful"}, "'ful' is not valid: did you mean 'full'?"),
        ({"lmbda": 0, "teacher_scores": {"top_k": 0}}, "teacher_scores.top_k: 0 is not valid"),
        (
            {"lmbda": 0, "teacher_scores": "full", "objectives": [{"beta": 0}, {"type": "adversarial"}]},
            "adversarial reads more of the teacher than its distributions, which are all",
        ),
        (
            {
                "lmbda": 0,
                "teacher_scores": "full",
                "objectives": [{"type": "uld"}, {"type": "cross_entropy"}],
            },
            "uld reads more of the teacher than its distributions",
        ),
        (
            {
                "lmbda": 0,
                "teacher_scores": "full",
                "objectives": [{"beta": 0, "teacher": "start"}, {"type": "cross_entropy"}],
            },
            "teacher_scores: they come from the run's own teacher",
        ),
        ({"student": SERVER}, "student: a model behind a server cannot be trained"),
        (
            {"teacher": {**SERVER, "layers": 2}},
            "teacher.layers: cannot be set for a teacher behind a server",
        ),
        (
            {"teacher": {"server": "http://a/v1", "top_k": 2}},
            "teacher.model: missing; expected {server: http://a",
        ),
        ({"teacher": {"server": "http://a/v1", "model": "m"}}, "teacher.top_k: missing"),
        ({"teacher": {**SERVER, "server": "a:8000"}}, "teacher.server: 'a:8000'"),
        (
            {"teacher": SERVER, "teacher_scores": "full", "lmbda": 0},
            "teacher_scores: a teacher behind a server",
        ),
        ({"teacher": SERVER, "source": "teacher", "lmbda": 0}, "source.text: a teacher behind a server"),
        (
            {"teacher": SERVER, "task": "words"},
            "words has encoder-decoder models",
        ),
    ],
)
def test_what_cannot_be_is_refused(document: dict[str, Any], said: str) -> None:
    assert said in get_refusal(**document)


def test_an_address_that_holds_a_key_is_refused_without_repeating_it() -> None:
    for address in ("http://me:hunter22@host:1/v1", "http://host:1/v1?key=hunter22"):
        said = get_refusal(teacher={**SERVER, "server": address})
        assert "must not hold a key: give http://host:1/v1, and the key in" in said
        assert "hunter22" not in said
