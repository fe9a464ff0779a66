"""The paper's numbers, typed from its tables once more: what a task's paper scale resolves to."""

from typing import Any

import pytest

from gkd_lab.config import Cell, Evaluation, RevisionLookup, expand_grid
from gkd_lab.config.artifact_specs import DataSpec
from gkd_lab.config.experiment import parse_experiment
from gkd_lab.tasks import TASKS

# steps, batch, learning rate, warm-up, cool-down, dropout, tokens in, tokens out, teacher temperature
TABLES: dict[str, tuple[float, ...]] = {
    "summarization": (40_000, 32, 1e-3, 2_000, 10_000, 0.0, 1024, 64, 1.0),  # Table A.1, T5-small
    "arithmetic": (40_000, 32, 3e-4, 2_000, 10_000, 0.05, 512, 320, 0.1),  # Table A.2
    "translation": (100_000, 32, 3e-4, 5_000, 0, 0.0, 80, 80, 1.0),  # Table A.3
    "instruction": (50_000, 128, 1e-4, 0, 0, 0.0, 2048, 256, 1.0),  # Table A.4
}
SFT_STEPS = {  # §4.1 to §4.4: small, base, large, xl
    "summarization": (100_000, 50_000, 38_000, 8_000),
    "arithmetic": (10_000, 10_000, 10_000, 10_000),
    "translation": (250_000, 250_000, 110_000, 50_000),
    "instruction": (None, None, None, None),
}


def expand_cell(task: str, **fields: Any) -> Cell:
    experiment = parse_experiment({"description": "d", "task": task, **fields}, "paper")
    seen = RevisionLookup(
        resolve_data=lambda task, settings: DataSpec(kind="hub", name=settings.source, revision="1"),
        resolve_model=lambda place: (place, None, "1"),
    )
    (cell,) = expand_grid("paper", experiment, TASKS, seen, "paper").cells
    return cell


@pytest.mark.parametrize("task", TABLES)
def test_training_settings_equal_the_papers_table(task: str) -> None:
    training = expand_cell(task).training
    optimizer_settings = (
        training.steps,
        training.batch_size,
        training.optimizer.learning_rate,
        training.optimizer.warmup_steps,
    )
    sizes = (
        training.optimizer.cooldown_steps,
        training.dropout,
        training.max_input_tokens,
        training.max_output_tokens,
    )
    assert (*optimizer_settings, *sizes, training.objectives[0].teacher_temperature) == TABLES[task]
    assert training.optimizer.name == "adafactor"
    assert (training.source.temperature, training.objectives[0].student_temperature) == (1, 1)
    assert {training.start.family, training.teacher.family} == {"encoder-decoder"}


@pytest.mark.parametrize("task", SFT_STEPS)
def test_fine_tuning_steps_equal_the_papers(task: str) -> None:
    starts = [expand_cell(task, student=name).training.start.sft for name in ("small", "base", "large", "xl")]
    assert tuple(sft and sft.steps for sft in starts) == SFT_STEPS[task]


@pytest.mark.parametrize(
    ("fields", "rate"),
    [
        ({"student": "small"}, 1e-3),
        ({"student": "small", "beta": 0.9}, 1e-3),
        ({"student": "small", "beta": 1}, 3e-4),
        ({"student": "small", "divergence": "tv"}, 1e-3),
        ({"student": "base"}, 3e-4),
        ({"student": "large", "beta": 1}, 3e-4),
        ({"student": "small", "learning_rate": 5e-4, "beta": 1}, 5e-4),  # stated: nothing is exchanged
    ],
    ids=str,
)
def test_t5_small_has_its_own_learning_rate_on_xsum_except_for_reverse_kl(
    fields: dict[str, Any], rate: float
) -> None:
    assert expand_cell("summarization", **fields).training.optimizer.learning_rate == rate
    long_form = {"beta": 1, "teacher_temperature": 1, "student_temperature": 1}
    assert expand_cell("summarization", objectives=[long_form]).training.optimizer.learning_rate == 3e-4


def test_each_task_is_decoded_as_in_the_paper() -> None:
    (xsum,), (wmt,), (gsm8k,) = (
        expand_cell(t).evaluations for t in ("summarization", "translation", "arithmetic")
    )
    assert isinstance(wmt, Evaluation) and isinstance(gsm8k, Evaluation)
    assert xsum.name == "greedy@validation"
    assert (wmt.name, wmt.length_penalty) == ("beam4@validation", 0.6)
    assert wmt.length_penalty_form == "wu"  # Raffel et al. 2020: beam search of T5X
    assert gsm8k.name == "greedy+calculator"
    data = expand_cell("arithmetic").training.data
    assert (data.shots, data.calculator_marks) == (4, True)
    assert [e.name for e in expand_cell("instruction").evaluations] == ["mmlu_5shot", "bbh_fewshot"]


def test_the_row_format_is_hashed_and_its_default_is_left_out() -> None:
    plain, shown = (expand_cell("arithmetic", data={"shots": shots}).fingerprint for shots in (0, 4))
    assert plain != shown
    bare = expand_cell(
        "arithmetic", data={"shots": 0, "calculator_marks": False}
    ).training.data.canonical_json
    assert "shots" not in bare and "calculator" not in bare
