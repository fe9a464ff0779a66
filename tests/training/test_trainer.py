"""Invariants of the one trainer: what may not change a cell's result, and what must."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gkd_lab.config.artifact_specs import Family
from gkd_lab.encoding.batches import Example, KeyedBatchSampler, collate_examples
from gkd_lab.losses import chunk_sums
from gkd_lab.losses.divergence import generalized_jsd
from gkd_lab.models.forward import Sequences, compute_completion_logits
from gkd_lab.models.packing import Pack
from gkd_lab.models.rng import draw_permutation, draw_uniforms, is_on_policy
from gkd_lab.training.sampling import generate_completions
from gkd_lab.training.trainer import GKDTrainer

from ..models.tiny import END, FAMILIES, PAD, tiny_examples, tiny_model, tiny_tokenizer
from ..models.waits import WaitCounter
from .driving import MIXED, arguments, assert_close, cell, distil, largest_difference, mixed

pytestmark = pytest.mark.usefixtures("float64_norms")


# ---- what must not matter ----


@pytest.mark.parametrize(
    ("family", "normalization"), (("decoder-only", "sequence"), ("encoder-decoder", "token"))
)
def test_accumulation_changes_nothing(family: Family, normalization: str, tmp_path: Path) -> None:
    runs = [
        distil(
            tmp_path,
            family,
            mixed(tmp_path),
            max_steps=5,
            per_device_train_batch_size=8 // accumulated,
            gradient_accumulation_steps=accumulated,
            loss_normalization=normalization,
        )
        for accumulated in (1, 2, 8)
    ]
    for other in runs[1:]:
        for n in range(len(MIXED)):
            assert largest_difference(runs[0], other, n, n) < 1e-10
            assert_close(runs[0].weights(n), other.weights(n))
            for key in ("on_policy", "completion_length", "truncated", "grad_norm"):
                mine = [row[key] for row in runs[0].history[n]]
                assert mine == pytest.approx([row[key] for row in other.history[n]], abs=1e-9)


@pytest.mark.parametrize(
    ("family", "normalization"), (("decoder-only", "sequence"), ("encoder-decoder", "token"))
)
def test_on_policy_the_references_do_not_matter(family: Family, normalization: str, tmp_path: Path) -> None:
    long = tiny_examples(longest=9)
    short = [Example(example.prompt_ids, [END]) for example in long]
    cells = [cell(tmp_path, "0", lmbda=1.0), cell(tmp_path, "1", lmbda=0.0)]
    first, second = (
        distil(tmp_path, family, cells, examples=rows, loss_normalization=normalization)
        for rows in (long, short)
    )
    assert first.losses(0) == pytest.approx(second.losses(0), abs=1e-12)
    assert_close(first.weights(0), second.weights(0), 1e-12)
    assert first.losses(1) != second.losses(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_loss(family: Family, tmp_path: Path) -> None:
    """One prompt of forty words makes every other row's padding long."""
    rows = tiny_examples(8)
    wide = [*rows[:7], Example(rows[7].prompt_ids * 7, rows[7].completion_ids * 3)]
    trainer = distil(tmp_path, family, [cell(tmp_path, lmbda=0.0)], max_steps=1).trainer
    for examples in (rows, wide):
        alone = torch.cat([loss_of(trainer, [example]) for example in examples])
        torch.testing.assert_close(loss_of(trainer, examples)[0], alone.mean(), rtol=0, atol=1e-12)


def loss_of(trainer: GKDTrainer, examples: list[Example]) -> Tensor:
    """The loss on the examples' own targets, (K,), one batch."""
    encoder_decoder = trainer.pack.model.config.is_encoder_decoder
    rows = collate_examples(examples, PAD, is_encoder_decoder=encoder_decoder)
    with torch.no_grad():
        loss, _, _ = trainer.prediction_step(trainer.model, vars(rows), True)
    assert loss is not None
    return loss.reshape(1)


def test_the_order_of_rows_in_a_batch_changes_no_loss(tmp_path: Path) -> None:
    trainer = distil(tmp_path, "encoder-decoder", [cell(tmp_path)], max_steps=1).trainer
    rows = tiny_examples(8)
    torch.testing.assert_close(loss_of(trainer, rows), loss_of(trainer, rows[::-1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neighbour_changes_nothing(family: Family, tmp_path: Path) -> None:
    cell_args = cell(tmp_path, "0", lmbda=0.5)
    beside = [cell(tmp_path, "1", lmbda=lmbda, beta=1.0, seed=4) for lmbda in (0.0, 1.0)]
    first, second = (distil(tmp_path, family, [cell_args, other]) for other in beside)
    assert first.losses() == pytest.approx(second.losses(), abs=1e-12)
    assert_close(first.weights(), second.weights(), 1e-10)


# ---- what a step trains on ----


def expected_loss(family: Family, step: int, lmbda: float, normalization: str, beta: float = 0.1) -> float:
    """The loss of a step that changes nothing (rate 0), from the definitions, row by row."""
    student, teacher = tiny_model(family, 7), tiny_model(family, 3, width=32)
    examples, encoder_decoder = tiny_examples(), family == "encoder-decoder"
    chosen = [examples[n] for n in draw_permutation(0, 0, len(examples))[8 * step : 8 * step + 8]]
    noise = draw_uniforms(0, step, "sampling", 8, 8)
    sums, lengths = [], []
    for n, example in enumerate(chosen):
        row = collate_examples([example], PAD, is_encoder_decoder=encoder_decoder)
        if is_on_policy(lmbda, 0, step):
            row = generate_completions(
                student,
                row,
                max_new_tokens=8,
                end_ids=torch.tensor([END]),
                pad_id=PAD,
                uniforms=noise[n : n + 1],
            )
        length = int(row.completion_mask.sum())
        with torch.no_grad():
            q, p = compute_completion_logits(student, row)[0], compute_completion_logits(teacher, row)[0]
        values = generalized_jsd(q[:length], p[:length], beta, teacher_temperature=0.5)
        sums.append(values.sum().item())
        lengths.append(length)
    if normalization == "token":
        return sum(sums) / sum(lengths)
    return sum(total / length for total, length in zip(sums, lengths, strict=True)) / 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normalization", ("sequence", "token"))
@pytest.mark.parametrize("lmbda", (0.0, 0.5, 1.0))
def test_the_loss_is_that_of_the_definition(
    family: Family, normalization: str, lmbda: float, tmp_path: Path
) -> None:
    """Row by row: the coin, the rows of the step, the noise of each row, Eq. 1 and Eq. 2."""
    cell_args = cell(tmp_path, lmbda=lmbda, beta=0.1, teacher_temperature=0.5, learning_rate=1e-30)
    run = distil(tmp_path, family, [cell_args], loss_normalization=normalization, max_steps=4)
    expected = [expected_loss(family, step, lmbda, normalization) for step in range(4)]
    assert run.losses() == pytest.approx(expected, abs=1e-10)
    tossed = [float(is_on_policy(lmbda, 0, step)) for step in range(4)]
    assert [row["on_policy"] for row in run.history[0]] == tossed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beta", (0.0, 0.1, 0.5, 0.9, 1.0))
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(
    family: Family, beta: float, tmp_path: Path
) -> None:
    run = distil(
        tmp_path,
        family,
        [cell(tmp_path, lmbda=0.5, beta=beta)],
        teacher=tiny_model(family, 7),
        max_steps=2,
        optim="sgd",
    )
    assert max(run.losses()) < 1e-12
    assert run.history[0][0]["grad_norm"] < 1e-12
    start = dict(tiny_model(family, 7).named_parameters())
    assert_close(run.weights(), {k: p.detach() for k, p in start.items()}, 1e-12)


@pytest.mark.parametrize("lmbda", (0.0, 1.0))
def test_the_loss_on_prompt_tokens_has_no_part_in_the_gradient(lmbda: float, tmp_path: Path) -> None:
    """Last hidden states at prompt positions get no gradient; those that predict the completion all do."""
    shapes: list[tuple[Tensor, Tensor]] = []

    def watch(trainer: GKDTrainer) -> None:
        def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            hidden = output.last_hidden_state
            if hidden.requires_grad:
                hidden.retain_grad()
                shapes.append((kwargs["attention_mask"], hidden))

        trainer.pack.model.model.register_forward_hook(keep, with_kwargs=True)

    examples = tiny_examples()
    run = distil(
        tmp_path,
        "decoder-only",
        [cell(tmp_path, lmbda=lmbda)],
        examples=examples,
        max_steps=1,
        prepare=watch,
    )
    assert len(shapes) == 1
    mask, hidden = shapes[0]
    touched = hidden.grad.abs().sum(-1) > 0  # type: ignore[union-attr]
    rows = [examples[n] for n in draw_permutation(0, 0, 40)[:8]]
    prompt_width = max(len(example.prompt_ids) for example in rows)
    predicts = mask[:, prompt_width:].bool()
    assert torch.equal(touched[:, prompt_width - 1 : -1], predicts)
    assert not touched[:, : prompt_width - 1].any() and not touched[:, -1].any()
    assert run.trainer.failures == {}


def test_every_trained_token_counts_up_to_and_with_the_end(tmp_path: Path) -> None:
    run = distil(tmp_path, "encoder-decoder", [cell(tmp_path, lmbda=0.0)], max_steps=5)
    lengths = [len(example.completion_ids) for example in tiny_examples()]
    logged = [row["completion_length"] for row in run.history[0]]
    assert sum(logged) / 5 == pytest.approx(sum(lengths) / 40)
    assert all(row["truncated"] == 0 for row in run.history[0])


def test_the_coin_is_tossed_once_a_step_and_logged(tmp_path: Path) -> None:
    run = distil(tmp_path, "decoder-only", mixed(tmp_path), max_steps=12)
    for n, kind in enumerate(MIXED):
        lmbda, seed = float(kind["lmbda"]), int(kind.get("seed", 0))
        expected = [float(is_on_policy(lmbda, seed, step)) for step in range(12)]
        assert [row["on_policy"] for row in run.history[n]] == expected
        assert [row["step"] for row in run.history[n]] == list(range(1, 13))


def test_truncated_is_the_share_of_written_rows_without_an_end(tmp_path: Path) -> None:
    run = distil(tmp_path, "decoder-only", [cell(tmp_path, lmbda=1.0)], max_new_tokens=1, max_steps=3)
    for row in run.history[0]:
        assert row["completion_length"] == 1
        assert 0 < row["truncated"] <= 1
    never = distil(tmp_path, "decoder-only", [cell(tmp_path, lmbda=0.0)], max_steps=3)
    assert [row["truncated"] for row in never.history[0]] == [0, 0, 0]


def test_a_row_of_the_log_is_the_mean_since_the_last_one(tmp_path: Path) -> None:
    every = distil(tmp_path, "decoder-only", mixed(tmp_path), max_steps=6)
    third = distil(tmp_path, "decoder-only", mixed(tmp_path), max_steps=6, logging_steps=3)
    for n in range(len(MIXED)):
        for key in ("loss", "on_policy", "completion_length", "grad_norm"):
            values = [row[key] for row in every.history[n]]
            means = [sum(values[:3]) / 3, sum(values[3:]) / 3]
            assert [row[key] for row in third.history[n]] == pytest.approx(means, abs=1e-12)


def test_each_cell_follows_the_schedule_at_its_own_rate(tmp_path: Path) -> None:
    cells = [cell(tmp_path, str(n), lmbda=0, learning_rate=rate) for n, rate in enumerate((1e-2, 1e-3))]
    run = distil(tmp_path, "decoder-only", cells, max_steps=6)
    shape = [row["learning_rate"] / 1e-2 for row in run.history[0]]
    assert [row["learning_rate"] / 1e-3 for row in run.history[1]] == pytest.approx(shape)
    assert shape == pytest.approx([0, 0.5, 1, 1, 1, 0.5])


def test_weight_decay_acts_on_each_cell_and_spares_norms(tmp_path: Path) -> None:
    cell_args = cell(tmp_path, lmbda=0, learning_rate=1e-2)
    options: dict[str, Any] = {"weight_decay": 0.5, "max_steps": 4}
    packed = distil(tmp_path, "encoder-decoder", [cell_args, replace(cell_args, beta=1.0)], **options)
    alone = distil(tmp_path, "encoder-decoder", [cell_args], packed=False, **options)
    free = distil(tmp_path, "encoder-decoder", [cell_args], packed=False, max_steps=4)
    assert_close(packed.weights(0), alone.weights(), 1e-12)
    moved = max((alone.weights()[k] - free.weights()[k]).abs().max() for k in free.weights())
    assert moved > 1e-3


# ---- the trainer as a user meets it ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_trains_as_a_pack_of_one(family: Family, tmp_path: Path) -> None:
    model, teacher = tiny_model(family, 7), tiny_model(family, 3, width=32)
    args = arguments(tmp_path, lmbda=0.5, beta=0.1, temperature=1.0, seed=5)
    trainer = GKDTrainer(
        model=model,
        teacher_model=teacher,
        args=args,
        train_dataset=tiny_examples(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    packed = distil(tmp_path, family, [cell(tmp_path, lmbda=0.5, beta=0.1, seed=5)])
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in logged] == pytest.approx(packed.losses(), rel=1e-6)  # float32
    assert {"on_policy", "completion_length", "truncated"} <= logged[0].keys()
    assert_close({k: p.detach() for k, p in model.named_parameters()}, packed.weights())
    assert all(not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_rows_too(family: Family, tmp_path: Path) -> None:
    rows = [{"prompt": "a b c =", "completion": "1 2"}, {"prompt": "d =", "completion": "3 1 2"}] * 4
    model = tiny_model(family, 7)
    trainer = GKDTrainer(
        model=model,
        teacher_model=tiny_model(family, 3),
        args=arguments(tmp_path, max_steps=2, lmbda=0.0),
        train_dataset=rows,
        eval_dataset=rows[:2],
        processing_class=tiny_tokenizer(),
    )
    assert trainer.data_collator(rows[:2])["completion_ids"][0, -2:].tolist() == [END, PAD]
    trainer.train()


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_the_mean_loss_on_the_data_s_targets(family: Family, tmp_path: Path) -> None:
    cells = mixed(tmp_path)
    trainer = distil(tmp_path, family, cells, max_steps=2).trainer
    state = copy.deepcopy(trainer.model.state_dict())
    packed_loss = trainer.evaluate(tiny_examples(8, seed=3))["eval_loss"]
    rows = collate_examples(tiny_examples(8, seed=3), PAD, is_encoder_decoder=family == "encoder-decoder")
    losses = []
    for n, cell_args in enumerate(cells):
        student, teacher = trainer.pack.unpack_cell(n), tiny_model(family, 3, width=32)
        with torch.no_grad():
            q, p = compute_completion_logits(student, rows), compute_completion_logits(teacher, rows)
        values = generalized_jsd(
            q.flatten(0, 1),
            p.flatten(0, 1),
            cell_args.beta,
            teacher_temperature=cell_args.teacher_temperature,
        ).view(q.shape[:2])
        lengths = rows.completion_mask.sum(-1)
        losses.append(((values * rows.completion_mask).sum(-1) / lengths).mean().item())
    assert packed_loss == pytest.approx(math.fsum(losses) / len(losses), abs=1e-6)
    assert all(torch.equal(state[name], value) for name, value in trainer.model.state_dict().items())


def test_a_number_of_cells_that_is_not_the_pack_s_is_refused(tmp_path: Path) -> None:
    models = [tiny_model("decoder-only", 0), tiny_model("decoder-only", 1)]
    with pytest.raises(ValueError, match=r"1 cells .* 2 models"):
        GKDTrainer(
            pack=Pack.build(models),
            cells=[cell(tmp_path)],
            teacher_model=models[0],
            args=arguments(tmp_path),
            processing_class=tiny_tokenizer(),
        )


def test_data_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 rows .* 4"):
        KeyedBatchSampler(3, 4, (0,))


def test_sequences_move_together() -> None:
    rows = collate_examples(tiny_examples(3), PAD, is_encoder_decoder=True)
    twice = rows.repeat_rows(2)
    assert isinstance(twice, Sequences)
    assert twice.num_rows == 6
    assert torch.equal(twice.prompt_ids[:3], twice.prompt_ids[3:])


def test_a_pack_whose_cells_would_need_several_texts_of_the_teacher_is_refused(tmp_path: Path) -> None:
    cells = [cell(tmp_path / "0", seed=0), cell(tmp_path / "1", seed=1)]
    with pytest.raises(ValueError, match=r"seed or temperature.*--pack off"):
        GKDTrainer(
            pack=Pack.build([tiny_model("decoder-only", n) for n in range(2)]),
            cells=cells,
            teacher_model=tiny_model("decoder-only", 3),
            args=arguments(tmp_path, seq_kd=True),
            train_dataset=tiny_examples(8),
            processing_class=tiny_tokenizer(),
        )


@pytest.mark.parametrize("lmbda", (0.0, 1.0))
@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_student_and_loss_are_launched_without_a_wait_for_the_device(
    family: Family, lmbda: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are counted once, before; then nothing is read until the step is complete."""
    monkeypatch.setattr(chunk_sums, "takes_all_blocks", lambda device: True)
    counter, compute_loss, tolist = WaitCounter(), GKDTrainer.compute_loss, Tensor.tolist
    n_losses = 0

    def count_list(tensor: Tensor) -> Any:
        counter.waits += 1
        return tolist(tensor)

    def count_loss(trainer: GKDTrainer, *args: Any, **options: Any) -> Any:
        nonlocal n_losses
        n_losses += 1
        with counter, monkeypatch.context() as patch:
            patch.setattr(Tensor, "tolist", count_list)
            return compute_loss(trainer, *args, **options)

    monkeypatch.setattr(GKDTrainer, "compute_loss", count_loss)
    betas = (0.0, 0.1, 0.5, 1.0)
    cells = [cell(tmp_path, str(n), lmbda=lmbda, beta=beta, seed=n % 2) for n, beta in enumerate(betas)]
    # Six prompt tokens at most, and completions of other widths.
    examples = [Example([3, 4, 5, 6, 7, 8][: 3 + n % 4], [*range(3, 6 + n % 6), END]) for n in range(40)]
    distil(tmp_path, family, cells, examples=examples, max_steps=3, max_new_tokens=9)
    assert (n_losses, counter.waits) == (3, 0)


def test_rows_without_a_completion_are_refused_where_a_cell_would_train_on_them(tmp_path: Path) -> None:
    examples = [Example([3, 4], [5, END] if n % 4 else []) for n in range(16)]
    with pytest.raises(ValueError, match="2 of 8 rows of a batch have no completion"):
        distil(
            tmp_path,
            "decoder-only",
            [cell(tmp_path, lmbda=0)],
            examples=examples,
            train_sampling_strategy="sequential",
        )
    distil(tmp_path, "decoder-only", [cell(tmp_path, lmbda=1)], examples=examples, max_steps=1)
