"""Classifiers through the trainer: against torch's own losses, packed, resumed, and what does not fit."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch.nn import functional
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PrinterCallback,
)

from gkd_lab import GKDTrainer
from gkd_lab.encoding.labelled_rows import (
    UNKNOWN_LABEL,
    LabelledRowEncoder,
)
from gkd_lab.losses.squared_error import LabelSquaredError, SquaredError
from gkd_lab.models.classifiers import ClassifierKind
from gkd_lab.models.packing import CannotPack, Pack
from gkd_lab.teachers.teacher import Teacher
from gkd_lab.training.classification_adapter import compute_classification_metrics

from ..models.tiny_classifiers import CONFIGS, tiny_classifier, tiny_rows, tiny_tokenizer
from .driving import arguments, assert_close, assert_identical, cell

KINDS: tuple[ClassifierKind, ...] = ("sequence-classification", "token-classification", "regression")
BOTH = [
    {
        "type": "divergence",
        "beta": 0.0,
        "teacher_temperature": 2.0,
        "student_temperature": 2.0,
        "square_temperature": True,
        "weight": 0.7,
    },
    {"type": "cross_entropy", "weight": 0.3},
]
BOTH_NUMBERS = [
    {"type": "squared_error", "weight": 0.7},
    {"type": "squared_error", "against": "labels", "weight": 0.3},
]


def trainer_of(folder: Path, kind: ClassifierKind, family: str = "bert", **changes: Any) -> GKDTrainer:
    options: dict[str, Any] = {
        "model": tiny_classifier(family, kind, 1),
        "teacher_model": tiny_classifier(family, kind, 2),
        "train_dataset": tiny_rows(kind),
        "processing_class": tiny_tokenizer(),
        "teacher_processing_class": tiny_tokenizer(),
    }
    overrides = {
        name: changes.pop(name) for name in [*options, "data_collator", "eval_dataset"] if name in changes
    }
    pack_options = {name: changes.pop(name) for name in ("pack", "cells", "more_teachers") if name in changes}
    if "pack" in pack_options:
        del options["model"]
    objectives = BOTH_NUMBERS if kind == "regression" else BOTH
    stated = {"lmbda": 0.0, "objectives": objectives, "loss_normalization": "token", **changes}
    trainer = GKDTrainer(args=arguments(folder, **stated), **{**options, **overrides}, **pack_options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights_of(trainer: GKDTrainer, number: int = 0) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.pack.get_cell_parameters(number).items()}


def expected_loss(
    student: Any, teacher: Any, kind: ClassifierKind, rows: list[dict[str, Any]]
) -> torch.Tensor:
    """Hinton's loss (2015, §2) row by row, without padding, by torch's own functions."""
    tokenizer, parts, count, temperature = tiny_tokenizer(), [], 0, 2.0
    for row in rows:
        ids = tokenizer(" ".join(row.get("tokens", [row.get("text")])), return_tensors="pt")["input_ids"]
        z, t = student(input_ids=ids).logits, teacher(input_ids=ids).logits.detach()
        z, t = z.reshape(-1, z.shape[-1]), t.reshape(-1, t.shape[-1])
        labels = torch.tensor(row.get("labels", [row.get("label")]))
        count += len(labels)
        if kind == "regression":
            hard = functional.mse_loss(z[:, 0], labels.float().to(z.dtype), reduction="sum")
            parts.append(0.7 * functional.mse_loss(z, t, reduction="sum") + 0.3 * hard)
        else:
            logs, targets = (z / temperature).log_softmax(-1), (t / temperature).softmax(-1)
            soft = temperature**2 * functional.kl_div(logs, targets, reduction="sum")
            parts.append(0.7 * soft + 0.3 * functional.cross_entropy(z, labels, reduction="sum"))
    return torch.stack(parts).sum() / count


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_torch_s_own_functions(
    tmp_path: Path, family: str, kind: ClassifierKind
) -> None:
    """Each row alone and without padding, so that padding and positions are right too."""
    rows = tiny_rows(kind, 6)
    trainer = trainer_of(tmp_path, kind, family)
    student, teacher = trainer.pack.model.eval(), trainer.teacher_model
    loss = trainer.compute_loss(student, trainer.data_collator(rows))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    expected = expected_loss(student, teacher, kind, rows)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sum(float(g.abs().sum()) for g in gradients.values()) > 0
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-9, msg=name)


def test_hand_computed_values_of_squared_errors() -> None:
    student = torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    values, gradient, entropy = SquaredError().value_and_gradient(
        student, torch.tensor([[1.0], [0.5]]).double()
    )
    assert values.tolist() == [4.0, 2.25]
    assert gradient.tolist() == [[4.0], [-3.0]]
    assert entropy.tolist() == [0.0, 0.0]
    values, gradient, _ = LabelSquaredError().value_and_gradient(student, torch.tensor([2.5, -1.0]))
    assert values.tolist() == [0.25, 0.0]
    assert gradient.tolist() == [[1.0], [0.0]]


def test_matching_logits_has_the_gradient_of_its_formula() -> None:
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    functional.mse_loss(student, teacher, reduction="none").mean(-1).sum().backward()
    values, gradient, entropy = SquaredError().value_and_gradient(student.detach(), teacher)
    torch.testing.assert_close(values, SquaredError()(student.detach(), teacher))
    torch.testing.assert_close(gradient, student.grad)
    expected = torch.distributions.Categorical(logits=student.detach()).entropy()
    torch.testing.assert_close(entropy, expected)


def test_logits_of_a_classifier_can_be_matched(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "sequence-classification", objectives=[{"type": "squared_error"}])
    rows = tiny_rows("sequence-classification", 4)
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(trainer.model, batch)
    read = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}
    pair = [model.eval()(**read).logits for model in (trainer.model, trainer.teacher_model)]
    assert loss.item() == pytest.approx(functional.mse_loss(*pair).item())


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_learns_its_teacher(tmp_path: Path, kind: ClassifierKind) -> None:
    objective = {"type": "squared_error"} if kind == "regression" else {"beta": 0.0}
    trainer = trainer_of(
        tmp_path, kind, objectives=[objective], max_steps=60, learning_rate=3e-3, eval_dataset=tiny_rows(kind)
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before


def test_a_regression_learns_its_teacher_s_numbers_by_default(tmp_path: Path) -> None:
    explicit = trainer_of(tmp_path, "regression", objectives=[{"type": "squared_error"}])
    unstated = trainer_of(tmp_path, "regression", objectives=None)
    batch = explicit.data_collator(tiny_rows("regression", 4))
    losses = [t.compute_loss(t.model, batch).item() for t in (explicit, unstated)]
    assert losses[0] == losses[1] > 0


def test_without_arguments_a_classifier_never_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_classifier("bert", "sequence-classification", 1)
    teacher = tiny_classifier("bert", "sequence-classification", 2)
    trainer = GKDTrainer(
        model=model,
        teacher_model=teacher,
        train_dataset=tiny_rows("sequence-classification"),
        processing_class=tiny_tokenizer(),
        teacher_processing_class=tiny_tokenizer(),
    )
    assert trainer.args.lmbda == 0


def test_a_classifier_is_loaded_by_name(tmp_path: Path) -> None:
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny_classifier("distilbert", "token-classification", seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    trainer = GKDTrainer(
        model=str(tmp_path / "student"),
        teacher_model=str(tmp_path / "teacher"),
        args=arguments(tmp_path, lmbda=0.0, max_steps=1),
        train_dataset=tiny_rows("token-classification"),
    )
    trainer.train()
    assert type(trainer.pack.model).__name__ == "DistilBertForTokenClassification"


# ---- labels ----


def test_a_teacher_with_its_labels_in_another_order_is_read_by_name(tmp_path: Path) -> None:
    kind: ClassifierKind = "sequence-classification"
    teacher = tiny_classifier("bert", kind, 2)
    swapped = copy.deepcopy(teacher)
    order = [2, 0, 1]
    with torch.no_grad():
        swapped.classifier.weight.copy_(teacher.classifier.weight[order])
        swapped.classifier.bias.copy_(teacher.classifier.bias[order])
    swapped.config.id2label = {n: teacher.config.id2label[old] for n, old in enumerate(order)}
    batch = trainer_of(tmp_path, kind).data_collator(tiny_rows(kind, 4))
    losses = []
    for model in (teacher, swapped):
        trainer = trainer_of(tmp_path, kind, teacher_model=model)
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_other_labels_are_refused_and_named(tmp_path: Path) -> None:
    kind: ClassifierKind = "sequence-classification"
    other = tiny_classifier("bert", kind, 2, labels=("no", "yes"))
    with pytest.raises(ValueError, match=r"student has 3 .*teacher has 2 .*'maybe'"):
        trainer_of(tmp_path, kind, teacher_model=other)
    renamed = tiny_classifier("bert", kind, 2, labels=("no", "maybe", "si"))
    with pytest.raises(ValueError, match=r"student has 'yes'; .*teacher has 'si'"):
        trainer_of(tmp_path, kind, teacher_model=renamed)


def test_a_label_can_be_a_class_name(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "sequence-classification")
    batch = trainer.data_collator([{"text": "a b", "label": "yes"}, {"text": "a", "label": 0}])
    assert batch["completion_ids"].tolist() == [[2], [0]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a", "label": 3},
            "label 3 .*maybe, yes",
        ),
        ({"text": "a", "label": -1}, "label -1"),
        ({"text": "a", "label": 0.5}, "label 0.5"),
        ({"text": "a", "label": "yse"}, "label 'yse' .*'yes'"),
        ({"text": "a"}, "no `label`.*text"),
        ({"sentence": "a", "label": 1}, "'sentence'"),
        ({"text": "", "label": 1}, "text is empty"),
    ],
)
def test_invalid_rows_are_refused_with_the_reason(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, "sequence-classification").data_collator([row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "labels": [1]}, "`labels` .*1 .*2 tokens"),
        ({"tokens": ["a", "b"], "labels": [1, 7]}, "label 7"),
        ({"text": "a b", "labels": [1, 1]}, "`tokens` or `input_ids`"),
        ({"tokens": ["a"], "label": 1}, "`label` has 1"),
    ],
)
def test_invalid_rows_of_tokens_are_refused_with_the_reason(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, "token-classification").data_collator([row])


@pytest.mark.parametrize("label", ["high", float("nan"), math.inf])
def test_a_regression_s_label_must_be_a_number(tmp_path: Path, label: Any) -> None:
    with pytest.raises(ValueError, match=f"{label!r} .*regression"):
        trainer_of(tmp_path, "regression").data_collator([{"text": "a", "label": label}])


def test_soft_targets_alone_need_no_labels(tmp_path: Path) -> None:
    """Metrics count only the rows that have a label."""
    for kind in KINDS:
        objective = {"type": "squared_error"} if kind == "regression" else {"beta": 0.0}
        rows = [{n: v for n, v in row.items() if not n.startswith("label")} for row in tiny_rows(kind)]
        trainer = trainer_of(
            tmp_path, kind, objectives=[objective], train_dataset=rows, eval_dataset=rows[:4], max_steps=2
        )
        trainer.train()
        metrics = trainer.evaluate()
        assert math.isfinite(metrics["eval_loss"]) and "eval_accuracy" not in metrics


def test_only_the_first_piece_of_a_word_has_its_label() -> None:
    from gkd_lab.config.artifact_specs import TokenizerSpec
    from gkd_lab.models.build import train_tokenizer

    tokenizer = train_tokenizer(TokenizerSpec(kind="bpe", vocab_size=300), ["a b"])
    rows = LabelledRowEncoder(
        tokenizer, "token-classification", ["x", "y"], max_length=None, labels_required=True
    )
    example = rows({"tokens": ["ab", "c"], "labels": [1, 0]})
    assert len(example.input_ids) == len(example.labels) > 2
    assert [label for label in example.labels if label != -100] == [1, 0]
    unknown = LabelledRowEncoder(
        tokenizer, "token-classification", ["x", "y"], max_length=None, labels_required=False
    )
    assert [label for label in unknown({"tokens": ["ab", "c"]}).labels if label != -100] == [
        UNKNOWN_LABEL,
        UNKNOWN_LABEL,
    ]


def test_rows_are_truncated_to_max_length(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "token-classification", max_length=3)
    batch = trainer.data_collator([{"tokens": list("abcde"), "labels": [0, 1, 2, 1, 0]}])
    assert batch["prompt_ids"].shape == batch["completion_ids"].shape == (1, 3)
    assert batch["completion_ids"].tolist() == [[0, 1, 2]]


def test_the_second_text_of_a_pair_has_token_type_1(tmp_path: Path) -> None:
    """Ready-made ids with `token_type_ids`, which BERT tells texts apart by."""
    trainer = trainer_of(tmp_path, "sequence-classification")
    row = {"input_ids": [3, 4, 5, 6], "label": 1}
    losses = []
    for types in ([0, 0, 0, 0], [0, 0, 1, 1]):
        batch = trainer.data_collator([{**row, "token_type_ids": types}, row])
        assert batch["token_type_ids"].tolist() == [types, [0, 0, 0, 0]]
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[0] != losses[1]
    plain = trainer.compute_loss(trainer.model, trainer.data_collator([row, row])).item()
    assert losses[0] == pytest.approx(plain)


def test_text_pair_is_read(tmp_path: Path) -> None:
    batch = trainer_of(tmp_path, "sequence-classification").data_collator(
        [{"text": "a b", "text_pair": "c", "label": 0}]
    )
    assert batch["prompt_ids"].shape == (1, 3)


# ---- batches of transformers' collators ----


@pytest.mark.parametrize("kind", KINDS)
def test_collators_of_transformers_give_the_same_loss(tmp_path: Path, kind: ClassifierKind) -> None:
    tokenizer, rows = tiny_tokenizer(), tiny_rows(kind, 6)
    theirs = []
    for row in rows:
        text = " ".join(row["tokens"]) if "tokens" in row else row["text"]
        labels = row["labels"] if "labels" in row else row["label"]
        read = tokenizer(text)
        theirs.append(
            {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"], "labels": labels}
        )
    of_tokens = kind == "token-classification"
    collator = (DataCollatorForTokenClassification if of_tokens else DataCollatorWithPadding)(tokenizer)
    trainer = trainer_of(tmp_path, kind)
    loss = trainer.compute_loss(trainer.model, collator(theirs)).item()
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()
    assert loss == pytest.approx(expected, rel=1e-12)


def test_a_batch_without_labels_is_named(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "sequence-classification")
    with pytest.raises(ValueError, match=r"\['input_ids'\] .*attention_mask, labels"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.ones(1, 2, dtype=torch.long)})


# ---- what does not fit ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_writes_nothing(tmp_path: Path, kind: ClassifierKind) -> None:
    with pytest.raises(ValueError, match=f"lmbda=0.5 .* {kind} "):
        trainer_of(tmp_path, kind, lmbda=0.5, objectives=None)
    with pytest.raises(ValueError, match="seq_kd=True"):
        trainer_of(tmp_path, kind, seq_kd=True)


@pytest.mark.parametrize("objective", [{"type": "cross_entropy"}, {"type": "divergence", "beta": 0.5}])
def test_a_regression_has_no_distribution(tmp_path: Path, objective: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{objective['type']} .*regression"):
        trainer_of(tmp_path, "regression", objectives=[objective])


def test_classes_are_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="squared_error against labels"):
        trainer_of(
            tmp_path, "sequence-classification", objectives=[{"type": "squared_error", "against": "labels"}]
        )
    with pytest.raises(ValueError, match=r"against: 'data' .*teacher, labels"):
        trainer_of(tmp_path, "regression", objectives=[{"type": "squared_error", "against": "data"}])
    with pytest.raises(ValueError, match=r"squared_error .*3 outputs"):
        LabelSquaredError().value_and_gradient(torch.zeros(2, 3), torch.zeros(2))


def test_what_only_a_language_model_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hidden_states .*language model"):
        trainer_of(tmp_path, "sequence-classification", objectives=[{"type": "hidden_states"}])


def test_a_teacher_made_for_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"regression .*teacher for sequence-classification"):
        trainer_of(
            tmp_path, "regression", teacher_model=tiny_classifier("bert", "sequence-classification", 2)
        )


def test_several_labels_at_once_are_refused(tmp_path: Path) -> None:
    model = tiny_classifier("bert", "sequence-classification", 1)
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=r"problem_type.* 3 labels"):
        trainer_of(tmp_path, "sequence-classification", model=model)


# ---- evaluation ----


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_has_the_metrics_of_its_kind(tmp_path: Path, kind: ClassifierKind) -> None:
    rows = tiny_rows(kind, 11, seed=4)
    trainer = trainer_of(tmp_path, kind, eval_dataset=rows, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    model, tokenizer = trainer.pack.model.eval(), tiny_tokenizer()
    outputs, true = [], []
    for row in rows:
        text = " ".join(row["tokens"]) if "tokens" in row else row["text"]
        logits = model(**tokenizer(text, return_tensors="pt")).logits.detach().numpy()
        outputs.append(logits.reshape(-1, logits.shape[-1]))
        true += row["labels"] if "labels" in row else [row["label"]]
    flat = np.concatenate(outputs)
    if kind == "regression":
        assert metrics["eval_pearson"] == pytest.approx(np.corrcoef(flat[:, 0], true)[0, 1], abs=1e-5)
        assert -1 <= metrics["eval_spearman"] <= 1
        return
    predicted = flat.argmax(-1)
    assert metrics["eval_accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert metrics["eval_f1_macro"] == pytest.approx(f1_score(true, predicted, average="macro"))
    assert metrics["eval_matthews"] == pytest.approx(matthews_corrcoef(true, predicted))


def test_two_labels_have_the_f1_of_the_second() -> None:
    logits, labels = np.array([[0, 1], [0, 1], [1, 0], [1, 0.0]]), np.array([1, 0, 1, -100])
    metrics = compute_classification_metrics(
        EvalPrediction(logits, labels), kind="sequence-classification", n_labels=2
    )
    assert metrics["f1"] == pytest.approx(f1_score([1, 0, 1], [1, 1, 0]))
    assert metrics["accuracy"] == pytest.approx(1 / 3)


def test_the_user_s_own_metrics_come_first(tmp_path: Path) -> None:
    rows = tiny_rows("sequence-classification")
    trainer = GKDTrainer(
        model=tiny_classifier("bert", "sequence-classification", 1),
        teacher_model=tiny_classifier("bert", "sequence-classification", 2),
        args=arguments(tmp_path, lmbda=0.0),
        train_dataset=rows,
        eval_dataset=rows[:3],
        processing_class=tiny_tokenizer(),
        teacher_processing_class=tiny_tokenizer(),
        compute_metrics=lambda evaluated: {"rows": float(len(evaluated.label_ids))},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 3.0 and "eval_accuracy" not in metrics


# ---- resuming, packing, several teachers ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, kind: ClassifierKind) -> None:
    straight = trainer_of(tmp_path / "one", kind)
    straight.train()
    half = trainer_of(tmp_path / "two", kind, save_strategy="steps", save_steps=3)
    half.train()
    resumed = trainer_of(tmp_path / "two", kind, save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-3"))
    assert_identical(weights_of(straight), weights_of(half))
    assert_identical(weights_of(straight), weights_of(resumed))


def cells_of(folder: Path, kind: ClassifierKind) -> list[Any]:
    """Three that differ in seed, rate and terms."""
    from gkd_lab.losses.divergence import Divergence
    from gkd_lab.losses.label_losses import CrossEntropy
    from gkd_lab.losses.squared_error import LabelSquaredError
    from gkd_lab.losses.terms import WeightedLoss

    soft: Any = SquaredError() if kind == "regression" else Divergence(beta=0.0, teacher_temperature=2.0)
    hard: Any = LabelSquaredError() if kind == "regression" else CrossEntropy()
    return [
        cell(folder, "0", lmbda=0.0, objectives=(WeightedLoss(soft),)),
        cell(folder, "1", lmbda=0.0, objectives=(WeightedLoss(hard),), seed=1),
        cell(
            folder,
            "2",
            lmbda=0.0,
            objectives=(WeightedLoss(soft, 0.5), WeightedLoss(hard, 0.5)),
            learning_rate=1e-3,
        ),
    ]


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", "sequence-classification"),
        ("bert", "token-classification"),
        ("llama", "sequence-classification"),
        ("modernbert", "token-classification"),
        ("distilbert", "regression"),
    ],
)
def test_three_packed_equal_each_alone(tmp_path: Path, family: str, kind: ClassifierKind) -> None:
    cells = cells_of(tmp_path, kind)
    pack = Pack.build([pack_member(family, kind) for _ in cells])
    together = trainer_of(tmp_path, kind, family, pack=pack, cells=cells)
    together.train()
    for n, cell_args in enumerate(cells):
        alone = trainer_of(
            tmp_path, kind, family, pack=Pack.build_single(pack_member(family, kind)), cells=[cell_args]
        )
        alone.train()
        assert_close(weights_of(together, n), weights_of(alone))


def pack_member(family: str, kind: ClassifierKind) -> Any:
    model = tiny_classifier(family, kind, 1)
    model.config.pad_token_id = 0
    return model


def test_a_classifier_with_its_own_position_numbers_is_refused_in_a_pack() -> None:
    members = [tiny_classifier("roberta", "sequence-classification", n) for n in range(2)]
    with pytest.raises(CannotPack, match=r"logits .*RobertaForSequenceClassification"):
        Pack.build(members)


def test_the_sum_of_two_teachers_is_the_sum_of_their_losses(tmp_path: Path) -> None:
    kind: ClassifierKind = "sequence-classification"
    second = tiny_classifier("bert", kind, 5)
    batch = trainer_of(tmp_path, kind).data_collator(tiny_rows(kind, 4))

    def loss(objectives: list[dict[str, Any]], **options: Any) -> float:
        trainer = trainer_of(tmp_path, kind, objectives=objectives, **options)
        return trainer.compute_loss(trainer.model, batch).item()

    summed = loss(
        [{"beta": 0.0, "weight": 0.4}, {"beta": 0.0, "teachers": [1], "weight": 0.6}],
        more_teachers=[Teacher(second, processing_class=tiny_tokenizer())],
    )
    apart = [loss([{"beta": 0.0}]), loss([{"beta": 0.0}], teacher_model=second)]
    assert summed == pytest.approx(0.4 * apart[0] + 0.6 * apart[1])
