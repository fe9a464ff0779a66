"""Expanding an experiment: order and number of cells, layers of settings, equal points."""

from typing import Any

import pytest

from gkd_lab.config.errors import ConfigError

from .stub import get_refusal, make_cell, make_grid


def test_axes_keep_the_order_of_the_file_and_the_first_varies_slowest() -> None:
    cells = make_grid(grid={"beta": [1, 0], "seed": [3, 1, 2]}).cells
    assert [(cell.beta, cell.seed) for cell in cells] == [(1, 3), (1, 1), (1, 2), (0, 3), (0, 1), (0, 2)]
    turned = make_grid(grid={"seed": [0, 1], "data.train": [20, 10], "beta": [1, 0]})
    assert list(turned.axes) == ["task", "seed", "data.train", "beta"]
    assert [(cell.seed, cell.beta) for cell in turned.cells[::2]] == [(0, 1), (0, 1), (1, 1), (1, 1)]


def test_the_task_can_be_an_axis() -> None:
    cells = make_grid(grid={"task": ["words", "sums"], "lmbda": [0, 1]}).cells
    assert [(cell.task, cell.lmbda) for cell in cells] == [
        ("words", 0),
        ("words", 1),
        ("sums", 0),
        ("sums", 1),
    ]
    assert cells[0].training.start.family == "encoder-decoder"
    assert cells[0].evaluations[0].metrics == ("bleu", "chrf")


def test_an_experiment_without_a_grid_is_one_cell() -> None:
    assert len(make_grid().cells) == len(make_grid(grid={}).cells) == 1


def test_points_with_equal_trainings_become_one_cell() -> None:
    grid = make_grid(grid={"lmbda": [0, 1], "temperature": [0.5, 1, 2]})
    assert len(grid.cells) == 4
    (off_policy,) = (cell for cell in grid.cells if cell.lmbda == 0)
    assert off_policy.training.source.temperature is None
    assert list(grid.stands_for) == [off_policy.full_fingerprint]
    labels = grid.stands_for[off_policy.full_fingerprint]
    assert [label["temperature"] for label in labels] == [0.5, 1, 2]
    assert {label["lmbda"] for label in labels} == {0}


def test_total_variation_is_one_cell_across_betas() -> None:
    grid = make_grid(grid={"divergence": ["jsd", "tv"], "beta": [0, 0.5, 1]})
    assert [(cell.divergence, cell.beta) for cell in grid.cells] == [
        ("jsd", 0),
        ("jsd", 0.5),
        ("jsd", 1),
        ("tv", None),
    ]
    labels = {"task": "sums", "divergence": "tv"}
    assert grid.stands_for == {
        grid.cells[-1].full_fingerprint: tuple({**labels, "beta": beta} for beta in (0, 0.5, 1))
    }


def test_tf32_is_part_of_a_cell_only_where_it_changes_products() -> None:
    plain = make_cell().training
    assert make_cell(tf32=False).training == plain
    assert "tf32" not in plain.canonical_json
    assert make_cell(tf32=True).training.fingerprint != plain.fingerprint
    assert make_cell(tf32=True).training.start == plain.start
    doubled = make_cell(precision="fp64").training
    assert make_cell(precision="fp64", tf32=True).training == doubled


def test_total_variation_ignores_beta() -> None:
    plain = make_cell(divergence="tv")
    assert plain.beta is None
    assert make_cell(divergence="tv", beta=0.5).training == plain.training
    assert make_cell({"divergence": "tv", "beta": "0.5"}).training == plain.training
    (crossed,) = make_grid(divergence="tv", grid={"beta": [0, 1]}).cells
    assert crossed.training == plain.training


def test_rescaling_changes_only_betas_between_the_kls() -> None:
    axes = {"divergence": ["jsd", "tv"], "beta": [0, 0.1, 1], "rescale_divergence": [False, True]}
    grid = make_grid(grid=axes)
    seen = [(cell.divergence, cell.beta, cell.training.objectives[0].rescale) for cell in grid.cells]
    assert seen == [
        ("jsd", 0, False),
        ("jsd", 0.1, False),
        ("jsd", 0.1, True),
        ("jsd", 1, False),
        ("tv", None, False),
    ]
    assert sorted(map(len, grid.stands_for.values())) == [2, 2, 6]


@pytest.mark.parametrize(
    ("axis", "values", "place"),
    [
        ("precision", ["fp32", "bf16", "fp64"], "precision"),
        ("tf32", [False, True], "tf32"),
        ("dropout", [0, 0.1], "dropout"),
        ("loss_normalization", ["sequence", "token"], "loss_normalization"),
        ("optimizer", ["adamw", "adafactor"], "optimizer.name"),
        ("divergence", ["jsd", "tv"], "objectives.divergence"),
        ("rescale_divergence", [False, True], "objectives.rescale"),
        ("teacher_temperature", [0.1, 1], "objectives.teacher_temperature"),
        ("student_temperature", [0.5, 1], "objectives.student_temperature"),
        ("temperature", [0.5, 1], "source.temperature"),
    ],
)
def test_each_choice_of_the_loss_can_be_an_axis(axis: str, values: list[Any], place: str) -> None:
    def resolved(value: Any) -> Any:
        for name in place.split("."):
            value = getattr(value, name)
            value = value[0] if isinstance(value, tuple) else value
        return value

    cells = make_grid(beta=0.5, grid={axis: values}).cells
    assert [resolved(cell.training) for cell in cells] == values
    assert len({cell.fingerprint for cell in cells}) == len(values)
    by_set = make_grid({axis: str(values).replace("'", "")}, beta=0.5).cells
    assert [cell.training for cell in by_set] == [cell.training for cell in cells]


def test_grids_of_one_name_are_told_apart_by_their_cells_axes_and_evaluations() -> None:
    grids = [
        make_grid(grid={"lmbda": [0, 1]}),
        make_grid(grid={"lmbda": [1, 0]}),
        make_grid(grid={"lmbda": [0, 1], "seed": [0]}),
        make_grid(grid={"lmbda": [0, 0.5]}),
        make_grid(grid={"lmbda": [0, 1]}, evaluations=[{"decoding": "beam"}]),
        make_grid(grid={"lmbda": [0, 1]}, evaluations=[{"decoding": "greedy", "metrics": ["bleu"]}]),
    ]
    assert len({grid.fingerprint for grid in grids}) == len(grids)
    again = make_grid(grid={"lmbda": ["0.0", 1]}, description="said otherwise")
    assert again.fingerprint == grids[0].fingerprint
    assert len(again.fingerprint) == 8


def test_a_repeated_axis_value_is_one_cell() -> None:
    grid = make_grid(grid={"lmbda": [0.5, "0.5"]})
    assert len(grid.cells) == 1
    assert grid.axes["lmbda"] == (0.5,)
    assert grid.stands_for == {}


def test_per_task_settings_win_over_common_ones() -> None:
    document = {"steps": 5, "batch_size": 2, "per_task": {"words": {"steps": 7, "batch_size": 3}}}
    sums, words = make_grid(grid={"task": ["sums", "words"]}, **document).cells
    assert (sums.training.steps, words.training.steps) == (5, 7)
    assert (sums.training.batch_size, words.training.batch_size) == (2, 3)


def test_a_task_may_have_evaluations_of_its_own() -> None:
    document = {
        "evaluations": [{"decoding": "greedy", "split": "validation"}],
        "per_task": {"words": {"evaluations": [{"decoding": "beam"}]}},
    }
    sums, words = make_grid(grid={"task": ["sums", "words"]}, **document).cells
    assert [evaluation.name for evaluation in sums.evaluations] == ["greedy@validation"]
    assert [evaluation.name for evaluation in words.evaluations] == ["beam4"]


def test_null_is_unset_except_for_all_rows() -> None:
    assert make_cell(lmbda=None, steps=None).training == make_cell().training
    assert make_cell(data={"train": None}).training.data.train is None
    sizes = [cell.training.data.train for cell in make_grid(grid={"data.train": [None, 50]}).cells]
    assert sizes == [None, 50]


def test_a_field_of_a_section_can_be_an_axis() -> None:
    cells = make_grid(grid={"data.train": [10, 20], "tokenizer.vocab_size": [32]}).cells
    assert [cell.training.data.train for cell in cells] == [10, 20]
    assert {cell.training.data.test for cell in cells} == {10}
    assert {cell.training.start.tokenizer.vocab_size for cell in cells} == {32}


def test_changing_the_distillation_does_not_change_reference_models() -> None:
    changed = make_cell(
        learning_rate=0.5, warmup_steps=3, weight_decay=0.5, dropout=0.5, steps=10, lmbda=0
    ).training
    assert changed.start == make_cell().training.start
    assert changed.teacher == make_cell().training.teacher
    assert changed.optimizer.learning_rate == 0.5


def test_set_replaces_an_axis_of_the_file() -> None:
    grid = make_grid({"lmbda": "0,0.25"}, grid={"lmbda": [1], "beta": [0, 1]})
    assert grid.axes == {"task": ("sums",), "lmbda": (0, 0.25), "beta": (0, 1)}
    assert list(make_grid({"lmbda": "0.25"}, grid={"lmbda": [0, 1]}).axes) == ["task", "lmbda"]


def test_set_makes_an_axis_of_several_values_and_a_field_of_one() -> None:
    assert make_grid({"seed": "1,2"}, seed=5).axes["seed"] == (1, 2)
    assert make_grid({"seed": "[1, 2]"}).axes["seed"] == (1, 2)
    grid = make_grid({"seed": "7"}, seed=5)
    assert "seed" not in grid.axes
    assert grid.cells[0].seed == 7


def test_set_takes_fields_of_sections_and_whole_sections() -> None:
    assert make_cell({"data.train": "33"}).training.data.train == 33
    assert make_grid({"data.train": "30,40"}).axes["data.train"] == (30, 40)
    made = make_cell({"student": "{layers: 1, width: 6, heads: 3}"}).training.start.model
    assert made.architecture is not None
    assert (made.architecture.width, made.architecture.feed_forward) == (6, 24)


def test_set_wins_over_per_task_settings() -> None:
    document = {"per_task": {"sums": {"steps": 7, "data": {"train": 30, "test": 4}}}}
    assert make_cell({"steps": "2"}, **document).training.steps == 2
    data = make_cell({"data.train": "20"}, **document).training.data
    assert (data.train, data.test) == (20, 4)


def test_an_evaluation_drops_fields_that_its_decoding_ignores() -> None:
    ways = [
        {"decoding": "greedy", "temperature": 0.3, "num_beams": 7, "seed": 5},
        {"decoding": "sample", "num_beams": 7, "length_penalty": 2},
        {"decoding": "beam", "temperature": 0.3, "length_penalty": 0},
    ]
    greedy, sample, beam = make_cell(evaluations=ways).evaluations
    assert (greedy.temperature, greedy.num_beams, greedy.seed) == (None, None, None)
    assert greedy == make_cell().evaluations[0]
    assert (sample.temperature, sample.num_beams, sample.length_penalty) == (1.0, None, None)
    assert sample.seed == 0
    assert (beam.temperature, beam.num_beams, beam.length_penalty) == (None, 4, 0)
    assert [evaluation.name for evaluation in (greedy, sample, beam)] == ["greedy", "sample1", "beam4"]
    assert {evaluation.max_output_tokens for evaluation in (greedy, sample, beam)} == {12}


def test_the_form_of_the_length_penalty_is_hashed_and_its_default_is_left_out() -> None:
    ways = [
        {"decoding": "beam"},
        {"decoding": "beam", "length_penalty_form": "transformers"},
        {"decoding": "beam", "length_penalty_form": "wu"},
        {"decoding": "greedy", "length_penalty_form": "wu"},
    ]
    unsaid, default, wu, greedy = (make_cell(evaluations=[way]).evaluations[0] for way in ways)
    assert unsaid == default
    assert "length_penalty_form" not in default.canonical_json
    assert wu.fingerprint != default.fingerprint
    assert greedy == make_cell().evaluations[0]


def test_a_model_is_a_name_or_fields_or_a_checkpoint() -> None:
    assert make_cell(student="large").training.start.model == make_cell().training.teacher.model
    hub = make_cell(student="owner/tiny").training.start.model
    assert (hub.name, hub.pretrained, hub.revision) == ("tiny", "owner/tiny", "abc")
    local = make_cell(student="/models/tiny/").training.start.model
    assert (local.name, local.path, local.revision) == ("tiny", "/models/tiny/", "sha256:1")
    assert make_cell(student={"pretrained": "owner/tiny"}).training.start.sft is None


def test_reference_models_of_a_bf16_cell_are_fp32() -> None:
    training = make_cell(precision="bf16").training
    assert training.precision == "bf16"
    assert training.start == make_cell().training.start


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"lmbda": 0.5, "source": {"lmbda": 0.5, "temperature": 1}}, "source and lmbda"),
        ({"grid": {"beta": [0]}, "objectives": []}, "objectives"),
        (
            {"grid": {"divergence": ["tv"]}, "objectives": [{"beta": 0}]},
            "objectives and divergence",
        ),
        (
            {"rescale_divergence": True, "objectives": [{"beta": 0}]},
            "objectives and rescale_divergence",
        ),
        ({"method": "seqkd", "objectives": [{"beta": 0}]}, "objectives and method"),
        ({"student": {"layers": 2}}, "layers, width"),
        ({"student": {"layers": 1, "width": 7, "heads": 2}}, "width 7"),
        ({"student": "smal"}, "valid: large, small"),
        ({"scale": "paper"}, "it has: nano"),
        ({"task": "sum"}, "mean 'sums'?"),
        ({"grid": {"task": ["sums", "wrods"]}}, "task 'wrods'"),
        ({"per_task": {"wrods": {}}}, "task 'wrods'"),
        ({"task": None}, "axis `grid.task`"),
    ],
)
def test_an_invalid_experiment_is_refused_with_the_reason(document: dict, expected: str) -> None:
    assert expected in get_refusal(**document)


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ({"lmbda": "{"}, "lmbda={: expected"),
        ({"lmbda": ""}, "lmbda=: no value given"),
        ({"task.width": "3"}, "value 'sums', which has no fields"),
        ({"student.width": "3"}, "width 3 is not a multiple of heads 2"),
        ({"lmbd": "3"}, "field 'lmbd'"),
        ({"lmbd": "3,4"}, "field 'grid.lmbd'"),
        ({"lmbda": "0,1.5"}, "grid.lmbda[1]: 1.5"),
    ],
)
def test_an_invalid_override_is_refused_with_the_reason(sets: dict[str, str], expected: str) -> None:
    assert expected in get_refusal(sets, student="small")


def test_a_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)


def test_warmup_and_cooldown_scale_with_the_steps() -> None:
    usual = make_cell().training
    longer = make_cell(steps=10 * usual.steps).training
    assert longer.optimizer.warmup_steps == 10 * usual.optimizer.warmup_steps
    assert longer.optimizer.cooldown_steps == 10 * usual.optimizer.cooldown_steps
    assert make_cell(steps=10 * usual.steps, warmup_steps=7).training.optimizer.warmup_steps == 7


@pytest.mark.parametrize(
    "document",
    [
        {"steps": 10, "warmup_steps": 6, "cooldown_steps": 5},
        {"objectives": [{"type": "cross_entropy"}], "source": {"lmbda": 0.5}},
        {"tokenizer": {"kind": "bpe", "vocab_size": 100}},
    ],
)
def test_settings_that_cannot_work_together_are_refused(document: dict) -> None:
    with pytest.raises(ConfigError, match=r"10 steps|lmbda 0.5.*cross_entropy|vocab_size.*300"):
        make_cell(**document)


def test_the_number_of_test_rows_changes_the_evaluation_not_the_training() -> None:
    usual, fewer = make_cell(), make_cell(data={"test": 5})
    assert fewer.fingerprint == usual.fingerprint
    assert fewer.evaluations[0].examples == 5
    assert fewer.evaluations[0].fingerprint != usual.evaluations[0].fingerprint
