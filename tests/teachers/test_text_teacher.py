"""A student learns from a teacher of other tokens: on the data and on its own text, packed and resumed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from gkd_lab.config.artifact_specs import Family
from gkd_lab.encoding.row_encoder import RowEncoder
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.label_losses import CrossEntropy
from gkd_lab.losses.terms import WeightedLoss
from gkd_lab.models.packing import Pack
from gkd_lab.teachers.text_teacher import TwoTokenizerEncoder
from gkd_lab.training.trainer import GKDTrainer

from ..losses.descriptions import parse, uld
from ..models.tiny import FAMILIES, tiny_examples, tiny_tokenizer
from ..training.driving import Run, arguments, assert_close, assert_identical, cell
from ..training.pairs import model_of, pieces

ULD_ALONE = (WeightedLoss(uld()),)
BOTH = (WeightedLoss(uld(), 2.0), WeightedLoss(CrossEntropy()))


def distil_pair(
    folder: Path,
    cells: Sequence[CellArguments],
    *,
    family: Family = "decoder-only",
    students: Sequence[PreTrainedModel] | None = None,
    teacher: PreTrainedModel | None = None,
    rows: Sequence[Any] | None = None,
    resume: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **changes: Any,
) -> Run:
    """A student of words and a teacher of pieces."""
    models = list(students or [model_of(tiny_tokenizer(), 7, family) for _ in cells])
    history: list[list[dict[str, float]]] = [[] for _ in cells]
    trainer = GKDTrainer(
        pack=Pack.build(models) if len(models) > 1 else Pack.build_single(models[0]),
        cells=cells,
        teacher_model=teacher or model_of(pieces(), 3, family, width=32),
        teacher_processing_class=pieces(),
        args=arguments(folder, **changes),
        train_dataset=list(rows or tiny_examples()),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
        log_cell=lambda n, row: history[n].append(row),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return Run(trainer, history)


def three(folder: Path) -> list[CellArguments]:
    """One on the data, one half and half, one on its own text with another seed and other terms."""
    return [
        cell(folder, "0", lmbda=0.0, objectives=BOTH),
        cell(folder, "1", lmbda=0.5, objectives=ULD_ALONE),
        cell(folder, "2", lmbda=1.0, seed=1, objectives=(WeightedLoss(uld(2.0, 0.5), 3.0),)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_three_packed_cells_learn_what_each_learns_alone(family: Family, tmp_path: Path) -> None:
    cells = three(tmp_path)
    packed = distil_pair(tmp_path / "packed", cells, family=family)
    for n, cell_args in enumerate(cells):
        alone = distil_pair(tmp_path / f"alone{n}", [cell_args], family=family)
        assert alone.losses() == pytest.approx(packed.losses(n), abs=1e-9)
        assert_close(alone.weights(), packed.weights(n))
        assert all(loss > 0 for loss in packed.losses(n))
    assert all(row["loss/uld"] + row["loss/cross_entropy"] == row["loss"] for row in packed.history[0])
    assert [row["on_policy"] for row in packed.history[2]] == [1] * 6


class StopAt3(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 3


@pytest.mark.parametrize("packed", [False, True])
def test_a_resumed_run_is_equal_bit_for_bit(packed: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    cells_of_run = [three(tmp_path / name)[0 if packed else 1 : 3 if packed else 2] for name in "ab"]
    straight = distil_pair(tmp_path / "a", cells_of_run[0], **options)
    half = distil_pair(tmp_path / "b", cells_of_run[1], callbacks=[StopAt3()], **options)
    assert len(half.losses()) == 3
    place = Path(cells_of_run[1][0].output_dir if packed else tmp_path / "b") / "checkpoint-3"
    resumed = distil_pair(tmp_path / "b", cells_of_run[1], resume=str(place), **options)
    for n in range(len(cells_of_run[0])):
        assert_identical(resumed.weights(n), straight.weights(n))
        assert resumed.history[n] == straight.history[n][3:]


def test_training_makes_the_student_as_sure_as_its_teacher(tmp_path: Path) -> None:
    cell_args = cell(tmp_path, lmbda=0.0, learning_rate=1e-2, objectives=ULD_ALONE)
    losses = distil_pair(tmp_path, [cell_args], max_steps=60, learning_rate=1e-2).losses()
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_cells_on_the_same_rows_let_the_teacher_read_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    from gkd_lab.teachers import teacher

    says = teacher.LiveTeacher.compute_output

    def counted(self: Any, batch: Any, asks: Any = ()) -> Any:
        reads.append(batch.teacher.num_rows)
        return says(self, batch, asks)

    monkeypatch.setattr(teacher.LiveTeacher, "compute_output", counted)
    cells = [cell(tmp_path, str(n), lmbda=0.0, objectives=(WeightedLoss(uld(), n + 1.0),)) for n in range(3)]
    distil_pair(tmp_path, cells, max_steps=2)
    assert reads == [8, 8]


def test_a_pair_of_one_tokenizer_has_both_terms(tmp_path: Path) -> None:
    """And a student that equals its teacher has nothing to learn from either."""
    terms = (WeightedLoss(Divergence(beta=0.5)), WeightedLoss(uld()))
    twin = model_of(tiny_tokenizer(), 7)
    trainer = GKDTrainer(
        pack=Pack.build_single(model_of(tiny_tokenizer(), 7)),
        cells=[cell(tmp_path, lmbda=0.0, objectives=terms)],
        teacher_model=twin,
        teacher_processing_class=tiny_tokenizer(),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=tiny_examples(),
        processing_class=tiny_tokenizer(),
    )
    assert trainer.train().training_loss < 1e-7


def test_a_teacher_that_is_parked_reads_the_same(tmp_path: Path) -> None:
    cell_args = cell(tmp_path, lmbda=0.5, objectives=BOTH)
    weights = [distil_pair(tmp_path / str(n), [cell_args], park_teacher=bool(n)).weights() for n in range(2)]
    assert_identical(*weights)


def test_micro_batches_make_no_difference(tmp_path: Path) -> None:
    cell_args = cell(tmp_path, lmbda=0.5, objectives=BOTH)
    whole = distil_pair(tmp_path / "whole", [cell_args])
    parts = distil_pair(
        tmp_path / "parts", [cell_args], per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert_close(whole.weights(), parts.weights())


def test_evaluation_gives_the_loss(tmp_path: Path) -> None:
    run = distil_pair(tmp_path, [cell(tmp_path, lmbda=0.0, objectives=ULD_ALONE)], max_steps=1)
    metrics = run.trainer.evaluate(tiny_examples(16, seed=1))
    assert 0 < metrics["eval_loss"] < 2


def test_half_precision_is_close_to_float32(tmp_path: Path) -> None:
    cell_args, losses = cell(tmp_path, lmbda=0.0, objectives=ULD_ALONE), []
    for bf16 in (False, True):
        student = model_of(tiny_tokenizer(), 7, dtype=torch.float32)
        teacher = model_of(pieces(), 3, width=32, dtype=torch.float32)
        run = distil_pair(
            tmp_path / str(bf16), [cell_args], students=[student], teacher=teacher, max_steps=1, bf16=bf16
        )
        losses.append(run.losses()[0])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[1] != losses[0]


# ---- rows of a user ----

ANSWER = "{% if messages[1:] %}{{ messages[1].content }}{% endif %}"
ROWS = [
    {"messages": [{"role": "user", "content": f"a b {n}"}, {"role": "assistant", "content": f"{n} c"}]}
    for n in ("1", "2", "3")
]


def test_each_side_has_its_own_chat_template() -> None:
    student, teacher = tiny_tokenizer(), pieces()
    student.chat_template = "{{ messages[0].content }} = " + ANSWER
    teacher.chat_template = "Q: {{ messages[0].content }}\nA: " + ANSWER
    encoder = RowEncoder(student, is_encoder_decoder=False, max_length=64, max_new_tokens=8)
    prompts = TwoTokenizerEncoder(encoder, teacher, model_of(pieces(), 3).config)
    example = prompts(ROWS[0])
    assert student.decode(example.prompt_ids) == "a b 1 ="
    assert teacher.decode(prompts.teacher_prompts[tuple(example.prompt_ids)]) == "Q: a b 1\nA: "


def test_cached_prompts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gkd_lab.teachers.text_teacher.MAX_CACHED_PROMPTS", 2)
    encoder = RowEncoder(tiny_tokenizer(), is_encoder_decoder=False, max_length=64, max_new_tokens=8)
    initial_prompts = {(1, 2): [3]}
    prompts = TwoTokenizerEncoder(encoder, pieces(), model_of(pieces(), 3).config, initial_prompts)
    for text in ("a", "b", "c", "d"):
        prompts({"prompt": text, "completion": "1"})
    assert len(prompts.teacher_prompts) == 3


def test_a_row_that_the_teacher_cannot_read_is_named_as_its(tmp_path: Path) -> None:
    student = tiny_tokenizer()
    student.chat_template = "{{ messages[0].content }} ="
    encoder = RowEncoder(student, is_encoder_decoder=False, max_length=64, max_new_tokens=8)
    prompts = TwoTokenizerEncoder(encoder, pieces(), model_of(pieces(), 3).config)
    with pytest.raises(ValueError, match=r"teacher's tokenizer: .*no chat template"):
        prompts({"messages": ROWS[0]["messages"][:1]})


# ---- messages ----


def test_a_divergence_between_two_tokenizers_is_refused_with_a_way_out(tmp_path: Path) -> None:
    terms = (WeightedLoss(Divergence()), WeightedLoss(uld()))
    with pytest.raises(ValueError, match=r"share a tokenizer: .*\[\{type: uld\}"):
        distil_pair(tmp_path, [cell(tmp_path, lmbda=0.0, objectives=terms)])


def test_text_of_a_teacher_written_on_the_fly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share a tokenizer"):
        distil_pair(tmp_path, [cell(tmp_path, lmbda=0.0, objectives=ULD_ALONE)], seq_kd=True)


def test_a_teacher_that_is_no_model_here_is_refused() -> None:
    encoder = RowEncoder(tiny_tokenizer(), is_encoder_decoder=False, max_length=64, max_new_tokens=8)
    with pytest.raises(ValueError, match=r"uld .*give a model"):
        TwoTokenizerEncoder(encoder, pieces(), None)


@pytest.mark.filterwarnings("ignore:teacher and student have 14 vocabulary entries")
def test_a_teacher_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"uld .*teacher's tokenizer"):
        GKDTrainer(
            model=model_of(tiny_tokenizer(), 7),
            teacher_model=model_of(tiny_tokenizer(), 3),
            args=arguments(tmp_path, objectives=[{"type": "uld"}]),
            train_dataset=tiny_examples(),
            processing_class=tiny_tokenizer(),
        )


def test_workers_that_would_keep_the_prompts_to_themselves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataloader_num_workers to 0"):
        distil_pair(tmp_path, [cell(tmp_path, lmbda=0.0, objectives=ULD_ALONE)], dataloader_num_workers=1)


def test_a_configuration_names_it(tmp_path: Path) -> None:
    (term,) = parse([{"type": "uld", "weight": 2, "teacher_temperature": 0.5}])
    assert term == WeightedLoss(uld(teacher_temperature=0.5), 2)
    with pytest.raises(ValueError, match=r"beta'; .*student_temperature"):
        parse([{"type": "uld", "beta": 0.5}])
    with pytest.raises(ValueError, match=r"student_temperature: -1 .* 0"):
        parse([{"type": "uld", "student_temperature": -1}])
