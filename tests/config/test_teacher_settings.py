"""Teachers of a cell: several teachers, cached teacher scores, and teachers behind a server."""

from typing import Any

import pytest

from gkd_lab.config.artifact_specs import TeacherScores
from gkd_lab.config.cell import Training, list_references
from gkd_lab.config.packs import group_cells_into_packs

from .stub import get_refusal, make_cell, make_grid

# ---- several teachers ----

SMALL = {"layers": 1, "width": 8, "heads": 2}


def make_training(*objectives: dict[str, Any], **changes: Any) -> Training:
    return make_cell(objectives=list(objectives), source={"lmbda": 0.5}, **changes).training


def test_teachers_are_numbered_as_they_appear() -> None:
    training = make_training(
        {"beta": 0.1, "teacher": "small"},
        {"beta": 0.5},
        {"beta": 0.9, "teacher": ["teacher", "start", "small"], "mixture": [0.5, 0.25, 0.25]},
        teachers={"small": SMALL},
    )
    assert [objective.teachers for objective in training.objectives] == [(1,), (0,), (0, 2, 1)]  # type: ignore[union-attr]
    assert training.teachers[1] == training.start
    assert training.teachers[0].model.architecture is not None
    assert training.teachers[0].model.architecture.width == 8


def test_older_names_of_fields_describe_the_same_cell() -> None:
    old = {"teacher": ["teacher", "small"], "mixture": [0.7, 0.3], "mixture_temperatures": [1, 2]}
    new = {"teachers": ["teacher", "small"], "weights": [0.7, 0.3], "temperatures": [1, 2]}
    older, newer = (make_training({"beta": 0.1, **names}, teachers={"small": SMALL}) for names in (old, new))
    assert older == newer
    assert older.fingerprint == newer.fingerprint


def test_the_names_of_teachers_do_not_change_the_cell() -> None:
    alike = [
        make_cell(objectives=[{"beta": 0.1, "teacher": name}], source={"lmbda": 0}, teachers={name: SMALL})
        for name in ("small", "other")
    ]
    assert alike[0].fingerprint == alike[1].fingerprint
    plain = make_cell(objectives=[{"beta": 0.1}], source={"lmbda": 0})
    assert plain.training == make_cell(lmbda=0, beta=0.1).training


def test_the_names_of_routed_teachers_change_the_cell() -> None:
    cells = [
        make_cell(
            objectives=[{"beta": 0.1, "teacher": ["teacher", name], "routed": True}],
            source={"lmbda": 0},
            teachers={name: SMALL},
        )
        for name in ("small", "other")
    ]
    assert cells[0].fingerprint != cells[1].fingerprint


def test_all_teachers_of_a_cell_are_built_once() -> None:
    grid = make_grid(
        grid={"seed": [0, 1]},
        objectives=[{"beta": 0.1, "teacher": ["teacher", "small", "start"]}],
        source={"lmbda": 0},
        teachers={"small": SMALL},
    )
    assert [reference.role for reference in list_references(grid.cells)] == ["teacher", "start", "teacher"]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"teacher": "smal"}, "teacher 'smal'"),
        ({"teacher": ["small", "small"]}, "names a teacher twice"),
        ({"teacher": ["teacher", "small"], "mixture": [1.0]}, "1 weights"),
        ({"teacher": ["teacher", "small"], "mixture": [0.9, 0.2]}, "not 1.1"),
        ({"teacher": "small", "routed": True}, "routed"),
        ({"teacher": []}, "teachers []"),
        ({"teacher": "start"}, "from `start`"),
        ({"teachers": [0]}, "unknown teacher 0"),
        ({"teacher": "small", "teachers": "small"}, "name of teachers"),
    ],
)
def test_invalid_teachers_of_a_divergence_are_refused(objective: dict[str, Any], message: str) -> None:
    listed = [{"beta": 0.5, **objective}]
    assert message in get_refusal(objectives=listed, source={"lmbda": 0}, teachers={"small": SMALL})


def test_the_start_is_a_teacher_at_another_temperature_or_with_dropout() -> None:
    hold = {"beta": 0.5, "teacher": "start"}
    for temperature in ({"teacher_temperature": 0.5}, {"student_temperature": 2}):
        assert make_training({**hold, **temperature}).teachers == (make_training({"beta": 0.5}).start,)
    assert make_training(hold, dropout=0.1).dropout == 0.1


def test_a_mixture_of_one_teacher_is_that_teacher() -> None:
    mixed, plain = (
        make_cell(objectives=[{"beta": 0.5, **fields}], source={"lmbda": 0})
        for fields in ({"mixture": [1]}, {})
    )
    assert mixed.fingerprint == plain.fingerprint


def test_an_unused_teacher_does_not_change_the_cell() -> None:
    listed = [{"beta": 0.5}]
    cell = make_cell(objectives=listed, source={"lmbda": 0}, teachers={"small": SMALL})
    assert cell.training == make_cell(objectives=listed, source={"lmbda": 0}).training


def test_weights_that_are_all_0_are_refused() -> None:
    listed = [{"beta": 0.5, "weight": 0}, {"type": "cross_entropy", "weight": 0}]
    message = get_refusal(objectives=listed, source={"lmbda": 0})
    assert "objectives: all weights are 0" in message


def test_a_reserved_name_is_refused() -> None:
    listed = [{"beta": 0.5, "teacher": "start"}]
    message = get_refusal(objectives=listed, source={"lmbda": 0}, teachers={"start": SMALL})
    assert "'start' is reserved" in message


# ---- cached scores and servers ----

SERVER: dict[str, Any] = {"server": "http://127.0.0.1:8000/v1", "model": "large", "top_k": 20}


def test_teacher_scores_are_full_or_top_k() -> None:
    assert make_cell(lmbda=0, teacher_scores="full").training.teacher_scores == TeacherScores()
    assert make_cell(lmbda=0, teacher_scores={"top_k": 8}).training.teacher_scores == TeacherScores(top_k=8)
    assert make_cell(lmbda=0, teacher_scores="live").training == make_cell(lmbda=0).training


def test_the_format_of_teacher_scores_changes_the_cell() -> None:
    formats = ["live", "full", {"top_k": 8}, {"top_k": 8, "dtype": "float16"}]
    cells = make_grid(lmbda=0, grid={"teacher_scores": formats}).cells
    assert len({cell.fingerprint for cell in cells}) == 4
    assert (
        len({cell.training.scores_spec.fingerprint for cell in cells[1:] if cell.training.scores_spec}) == 3
    )
    assert "_scores-top8_seed=0-" in cells[2].folder


def test_cells_of_one_teacher_and_data_share_scores() -> None:
    axes = {"beta": [0, 0.5], "seed": [0, 1], "train_rows": [8, 16], "student": ["small", "large"]}
    cells = make_grid(lmbda=0, teacher_scores={"top_k": 8}, grid=axes).cells
    assert len(cells) == 16
    assert len({cell.training.scores_spec.fingerprint for cell in cells if cell.training.scores_spec}) == 1


def test_scores_of_teacher_text_differ_from_scores_of_targets() -> None:
    of_data = make_cell(lmbda=0, teacher_scores="full").training.scores_spec
    of_text = make_cell(source="teacher", lmbda=0, teacher_scores="full").training.scores_spec
    assert of_data is not None and of_text is not None
    assert (of_data.text_spec, of_data.fingerprint != of_text.fingerprint) == (None, True)
    assert of_text.text_spec == make_cell(source="teacher", lmbda=0).training.text_spec


def test_teacher_scores_are_dropped_if_no_term_reads_a_teacher() -> None:
    assert make_cell(method="sft", teacher_scores="full").training == make_cell(method="sft").training


def test_cells_with_and_without_teacher_scores_are_not_packed_together() -> None:
    cells = make_grid(lmbda=0, grid={"teacher_scores": ["live", "full"], "beta": [0, 0.5]}).cells
    made = [
        {cell.labels["teacher_scores"] for cell in pack} for pack in group_cells_into_packs(cells, "auto")
    ]
    assert made == [{"live"}, {"full"}]


def test_a_served_teacher_is_identified_by_its_name_and_top_k() -> None:
    cell = make_cell(teacher=SERVER)
    assert cell.training.teacher.model.served == "large"
    elsewhere = {**SERVER, "server": "https://cluster:8443/v1", "patience": 5}
    assert make_cell(teacher=elsewhere).fingerprint == cell.fingerprint
    for changed in ({"model": "larger"}, {"top_k": 8}):
        assert make_cell(teacher={**SERVER, **changed}).fingerprint != cell.fingerprint


def test_a_served_teacher_is_not_a_reference_model() -> None:
    assert [reference.role for reference in list_references([make_cell(teacher=SERVER)])] == ["start"]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (
            {"lmbda": 0.5, "teacher_scores": "full"},
            "lmbda 0.5",
        ),
        ({"lmbda": 0, "teacher_scores": "ful"}, "mean 'full'?"),
        ({"lmbda": 0, "teacher_scores": {"top_k": 0}}, "teacher_scores.top_k: 0"),
        (
            {"lmbda": 0, "teacher_scores": "full", "objectives": [{"beta": 0}, {"type": "adversarial"}]},
            "adversarial reads",
        ),
        (
            {
                "lmbda": 0,
                "teacher_scores": "full",
                "objectives": [{"type": "uld"}, {"type": "cross_entropy"}],
            },
            "uld reads",
        ),
        (
            {
                "lmbda": 0,
                "teacher_scores": "full",
                "objectives": [{"beta": 0, "teacher": "start"}, {"type": "cross_entropy"}],
            },
            "run's own teacher",
        ),
        ({"student": SERVER}, "cannot be trained"),
        (
            {"teacher": {**SERVER, "layers": 2}},
            "teacher.layers: cannot",
        ),
        (
            {"teacher": {"server": "http://a/v1", "top_k": 2}},
            "teacher.model: missing",
        ),
        ({"teacher": {"server": "http://a/v1", "model": "m"}}, "teacher.top_k: missing"),
        ({"teacher": {**SERVER, "server": "a:8000"}}, "teacher.server: 'a:8000'"),
        (
            {"teacher": SERVER, "teacher_scores": "full", "lmbda": 0},
            "teacher_scores: a teacher",
        ),
        ({"teacher": SERVER, "source": "teacher", "lmbda": 0}, "source.text: a teacher"),
        (
            {"teacher": SERVER, "task": "words"},
            "words has encoder-decoder models",
        ),
    ],
)
def test_invalid_scores_and_servers_are_refused(document: dict[str, Any], expected: str) -> None:
    assert expected in get_refusal(**document)


def test_an_address_that_holds_a_key_is_refused_without_repeating_it() -> None:
    for address in ("http://me:hunter22@host:1/v1", "http://host:1/v1?key=hunter22"):
        message = get_refusal(teacher={**SERVER, "server": address})
        assert "give http://host:1/v1," in message
        assert "hunter22" not in message
