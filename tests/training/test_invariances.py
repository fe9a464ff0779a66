"""What may not change a step's loss and gradient, for every family, through the trainer's own methods.

Packs of cells are in test_packed_cells.py, two ranks in test_ranks.py.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

from gkd_lab import GKDTrainer
from gkd_lab.encoding.batches import Example, collate_examples
from gkd_lab.encoding.trl_batch import build_trl_batch
from gkd_lab.losses.step_loss import MicroBatch
from gkd_lab.models.forward import Sequences
from gkd_lab.models.rng import is_on_policy

from ..models.families import DECODERS, FAMILIES, SINGLE, make
from ..models.tiny import PAD, tiny_examples, tiny_tokenizer
from . import scripts
from .driving import arguments

ROWS = 8
LONGEST = 6
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
ENCODER_DECODERS = tuple(name for name in FAMILIES if name not in DECODERS)
HEADS_UP, TAILS_UP = (
    next(step for step in range(100) if is_on_policy(0.5, 42, step) == side) for side in (True, False)
)
"""Steps of seed 42, transformers' default, on which a student with lmbda 0.5 writes, and does not."""

each_family = pytest.mark.parametrize("name", FAMILIES)
each_normalization = pytest.mark.parametrize("normalization", ["token", "sequence"])
each_side = pytest.mark.parametrize("step", [HEADS_UP, TAILS_UP], ids=["on policy", "off policy"])


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' norms and T5's attention cast to float32, where 1e-16 would become 1e-8."""
    to, single = torch.Tensor.to, torch.Tensor.float

    def wide(tensor: Tensor, *args: Any, **more: Any) -> Tensor:
        narrows = tensor.dtype == torch.float64 and tensor.dim() > 2 and args[:1] == (torch.float32,)
        return tensor if narrows else to(tensor, *args, **more)

    monkeypatch.setattr(torch.Tensor, "to", wide)
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else single(t))


@dataclass(frozen=True)
class Step:
    """One optimizer step that was not taken."""

    loss: float
    gradient: dict[str, Tensor]
    batches: list[MicroBatch]

    @property
    def norm(self) -> float:
        return torch.stack([g.double().norm() for g in self.gradient.values()]).norm().item()

    @property
    def completions(self) -> list[list[int]]:
        students = [batch.student for batch in self.batches]
        pairs = [(i, m) for s in students for i, m in zip(s.completion_ids, s.completion_mask, strict=True)]
        return [ids[mask.bool()].tolist() for ids, mask in pairs]


def made(name: str, folder: Path, *, teacher: int = 1, **changes: Any) -> GKDTrainer:
    """Student 0 of the family under a wider teacher; teacher 0 is the student itself."""
    return GKDTrainer(
        model=make(name, 0),
        teacher_model=make(name, teacher, width=32 if teacher else 16),
        args=arguments(folder, **{"lmbda": 0.5, "max_new_tokens": LONGEST, **changes}),
        train_dataset=tiny_examples(ROWS),
        processing_class=tiny_tokenizer(),
        teacher_processing_class=tiny_tokenizer(),
    )


def rows_of(name: str, examples: Sequence[Example]) -> Sequences:
    return collate_examples(examples, PAD, is_encoder_decoder=name in ENCODER_DECODERS)


def step_of(trainer: GKDTrainer, parts: Sequence[Sequences | dict[str, Tensor]], step: int) -> Step:
    """The loss and gradient of optimizer step `step` on the micro-batches `parts`, as `train` makes them."""
    trainer.state.global_step = step
    batches = [vars(part) if isinstance(part, Sequences) else part for part in parts]
    samples, items = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    return step_on(trainer, samples, items)


def step_on(trainer: GKDTrainer, samples: Sequence[dict[str, Any]], items: Any) -> Step:
    trainer.current_gradient_accumulation_steps = len(samples)
    trainer.model.zero_grad()
    loss = sum(trainer.training_step(trainer.model, dict(sample), items).item() for sample in samples)
    gradient = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return Step(loss, gradient, [sample["batch"] for sample in samples])


def assert_same(found: Step, expected: Step, name: str) -> None:
    """Up to the rounding of sums in another order: some eps of the family's dtype."""
    tolerance = 3e-5 if name in SINGLE else 1e-10
    assert expected.loss > 0.05
    assert found.loss == pytest.approx(expected.loss, rel=tolerance)
    assert found.gradient.keys() == expected.gradient.keys()
    for key, value in expected.gradient.items():
        gap = (found.gradient[key] - value).norm() / expected.norm
        assert gap < tolerance, key


def padded(rows: Sequences, prompt: tuple[int, int], completion: int) -> Sequences:
    """More padding: (left, right) of the prompt, right of the completion."""
    pad = nn.functional.pad
    return Sequences(
        pad(rows.prompt_ids, prompt, value=PAD),
        pad(rows.prompt_mask, prompt),
        pad(rows.completion_ids, (0, completion), value=PAD),
        pad(rows.completion_mask, (0, completion)),
    )


# ---- what the references look like, on policy ----


@each_family
@each_normalization
def test_on_policy_loss_does_not_depend_on_the_references(
    name: str, normalization: str, tmp_path: Path
) -> None:
    """Neither how long they are, nor which of their tokens carry a label, nor whether there are any."""
    trainer = made(name, tmp_path, loss_normalization=normalization)
    rows = rows_of(name, tiny_examples(ROWS))
    expected = step_of(trainer, [rows], HEADS_UP)
    unlabelled = rows.completion_mask * (torch.arange(rows.completion_mask.shape[1]) == 0)
    prompts = [example.prompt_ids for example in tiny_examples(ROWS)]
    for other in (
        rows_of(name, [Example(p, [3, *[4] * 6 * n, 1]) for n, p in enumerate(prompts)]),
        rows_of(name, [Example(p, []) for p in prompts]),
        replace(rows, completion_mask=unlabelled),
    ):
        result = step_of(trainer, [other], HEADS_UP)
        assert (result.loss, result.completions) == (expected.loss, expected.completions)
        assert all(torch.equal(value, expected.gradient[key]) for key, value in result.gradient.items())
    assert expected.loss > 0.05
    off = [step_of(trainer, [r], TAILS_UP).loss for r in (rows, replace(rows, completion_mask=unlabelled))]
    assert off[0] != off[1], "off policy they matter"


# ---- padding and order ----


@each_family
@each_side
@each_normalization
def test_the_amount_of_padding_changes_nothing(
    name: str, step: int, normalization: str, tmp_path: Path
) -> None:
    trainer = made(name, tmp_path, loss_normalization=normalization)
    rows = rows_of(name, tiny_examples(ROWS))
    expected = step_of(trainer, [rows], step)
    side = (0, 5) if name in ENCODER_DECODERS else (5, 0)
    for wide in (padded(rows, side, 0), padded(rows, (0, 0), 7)):
        result = step_of(trainer, [wide], step)
        assert result.completions == expected.completions
        assert_same(result, expected, name)


@each_family
@each_side
def test_the_side_of_the_padding_in_a_users_batch_changes_nothing(
    name: str, step: int, tmp_path: Path
) -> None:
    """Rows in TRL's form, all of their padding on the left or all of it on the right."""
    trainer = made(name, tmp_path)
    rows = rows_of(name, tiny_examples(ROWS))
    expected = step_of(trainer, [rows], step)
    for left in (True, False):
        assert_same(step_of(trainer, [in_one_row(name, rows, left)], step), expected, name)


def in_one_row(name: str, rows: Sequences, left: bool) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` as many collators lay them out."""
    if name in ENCODER_DECODERS:
        labels = rows.completion_ids.masked_fill(rows.completion_mask == 0, -100)
        label_order = sorted_by(rows.completion_mask, left)
        ids, mask = rows.prompt_ids, rows.prompt_mask
        labels = labels.gather(1, label_order)
    else:
        batch = build_trl_batch(rows)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = batch["labels"].gather(1, sorted_by(mask, left))
    order = sorted_by(mask, left)
    return {"input_ids": ids.gather(1, order), "attention_mask": mask.gather(1, order), "labels": labels}


def sorted_by(mask: Tensor, left: bool) -> Tensor:
    """Positions of each row with those of the padding first, or last."""
    return mask.argsort(dim=1, descending=not left, stable=True)


@each_family
@each_side
@each_normalization
def test_the_order_of_the_rows_changes_nothing(
    name: str, step: int, normalization: str, tmp_path: Path
) -> None:
    """On policy the rows are put in another order after they were written: noise belongs to a place."""
    trainer = made(name, tmp_path, loss_normalization=normalization)
    trainer.state.global_step = step
    batches = [vars(rows_of(name, tiny_examples(ROWS)))]
    (sample,), items = trainer.get_batch_samples(iter(batches), 1, torch.device("cpu"))
    expected = step_on(trainer, [sample], items)
    order = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    batch = sample["batch"]
    moved = replace(
        batch,
        student=batch.student.map_tensors(lambda t: t[order]),
        teacher=batch.teacher.map_tensors(lambda t: t[order]),
    )
    assert_same(step_on(trainer, [{**sample, "batch": moved}], items), expected, name)


# ---- accumulation ----


@each_family
@each_side
@each_normalization
def test_one_batch_of_eight_is_eight_of_one(name: str, step: int, normalization: str, tmp_path: Path) -> None:
    """Rows have different lengths, so that means of means would differ."""
    trainer = made(name, tmp_path, loss_normalization=normalization)
    examples = tiny_examples(ROWS)
    expected = step_of(trainer, [rows_of(name, examples)], step)
    assert len({len(row) for row in expected.completions}) > 1
    for size in (1, 4):
        parts = [rows_of(name, examples[n : n + size]) for n in range(0, ROWS, size)]
        result = step_of(trainer, parts, step)
        assert result.completions == expected.completions
        assert_same(result, expected, name)


@pytest.mark.parametrize("build", [scripts.llama, scripts.t5])
@each_normalization
def test_a_training_does_not_depend_on_how_its_steps_are_split(
    build: Callable[..., Any], normalization: str, tmp_path: Path
) -> None:
    """Two steps of a plain model through `train`, off and on policy: losses, norms and weights."""
    trainers = []
    for size in (8, 1, 4):
        trainer = scripts.trainer(
            tmp_path,
            scripts.conversations(16),
            model=build(0).double(),
            teacher=build(1, width=24).double(),
            arguments={
                "lmbda": 0.5,
                "loss_normalization": normalization,
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": ROWS // size,
                "max_grad_norm": 0.5,
                "lr_scheduler_type": "constant",
            },
        )
        trainer.train()
        trainers.append(trainer)
    assert scripts.logged(trainers[0], "on_policy") == [0.0, 1.0]
    for other in trainers[1:]:
        # The Trainer adds up losses in float32 for its log.
        assert scripts.losses(other) == pytest.approx(scripts.losses(trainers[0]), rel=1e-6)
        norms = [scripts.logged(made_trainer, "grad_norm") for made_trainer in (other, trainers[0])]
        assert norms[0] == pytest.approx(norms[1], rel=1e-9)
        expected = scripts.weights(trainers[0].model)
        for key, value in scripts.weights(other.model).items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-9, msg=key)


def test_a_smaller_last_micro_batch_draws_separate_noise(tmp_path: Path) -> None:
    """Nine rows of one prompt, whole and as 4 + 4 + 1: no two rows share their text, whatever the split."""
    rows = scripts.conversations(1) * 9
    written = []
    for size in (9, 4):
        trainer = scripts.trainer(
            tmp_path,
            rows,
            model=scripts.llama(0).double(),
            teacher=scripts.llama(1, width=24).double(),
            arguments={"lmbda": 1.0, "per_device_train_batch_size": size, "gradient_accumulation_steps": 3},
        )
        batches = [trainer.data_collator(rows[n : n + size]) for n in range(0, 9, size)]
        samples, _ = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
        students = [sample["batch"].student for sample in samples]
        written.append(
            [
                ids[mask.bool()].tolist()
                for part in students
                for ids, mask in zip(part.completion_ids, part.completion_mask, strict=True)
            ]
        )
    assert written[0] == written[1]
    assert len({tuple(text) for text in written[0]}) == 9


# ---- which positions are trained ----


@each_family
@each_side
def test_only_positions_that_predict_a_trained_token_get_a_gradient(
    name: str, step: int, tmp_path: Path
) -> None:
    """Exactly: not the prompt's, not the padding's, not those behind the end of sequence."""
    trainer = made(name, tmp_path)
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.retain_grad()
            outputs.append(output.last_hidden_state)

    model: Any = trainer.model
    body = model.get_decoder() if name in ENCODER_DECODERS else model.base_model
    body.register_forward_hook(keep)
    student = step_of(trainer, [rows_of(name, tiny_examples(ROWS))], step).batches[0].student
    (hidden,) = outputs
    assert hidden.grad is not None
    touched = hidden.grad.abs().sum(-1) > 0
    predicts = student.completion_mask.bool()
    if name in DECODERS:
        untrained = torch.zeros_like(student.prompt_mask).bool()
        # The last token of the prompt predicts the first one of the completion.
        predicts = nn.functional.pad(torch.cat([untrained, predicts], dim=1)[:, 1:], (0, 1))
    assert torch.equal(touched, predicts)
    assert predicts.any() and not predicts.all()


# ---- a teacher that is the student ----


@each_family
@each_side
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(
    name: str, step: int, tmp_path: Path
) -> None:
    """Total variation has a kink there, where the gradient's direction would be that of rounding."""
    trainer, other = (made(name, tmp_path, teacher=teacher) for teacher in (0, 2))
    rows = rows_of(name, tiny_examples(ROWS))
    tolerance = 1e-6 if name in SINGLE else 1e-12
    cell = trainer.cells[0]
    for measured in (*(replace(cell, beta=beta) for beta in BETAS), replace(cell, divergence="tv")):
        trainer.cells = (measured,)
        result = step_of(trainer, [rows], step)
        assert 0 <= result.loss < tolerance
        assert measured.divergence == "tv" or result.norm < 100 * tolerance
    assert step_of(other, [rows], step).norm > 1000 * tolerance


# ---- resuming ----


@pytest.mark.parametrize(
    ("build", "optimizer"), [(scripts.llama, "adamw_torch_fused"), (scripts.t5, "adafactor")]
)
def test_resumed_at_any_step_equals_straight_bit_for_bit(
    build: Callable[..., Any], optimizer: str, tmp_path: Path
) -> None:
    """With dropout, clipping, a schedule, both sides of the coin, and an epoch that ends after step 4."""

    def trainer(folder: Path, **more: Any) -> GKDTrainer:
        return scripts.trainer(
            folder,
            scripts.conversations(16),
            model=build(0, dropout=0.2),
            teacher=build(1, width=24),
            arguments={
                "lmbda": 0.5,
                "max_steps": 6,
                "gradient_accumulation_steps": 2,
                "disable_dropout": False,
                "max_grad_norm": 0.5,
                "warmup_steps": 2,
                "optim": optimizer,
                **more,
            },
        )

    straight = trainer(tmp_path / "a", save_strategy="steps", save_steps=1)
    straight.train()
    coins = scripts.logged(straight, "on_policy")
    assert len(coins) == 6 and set(coins) == {0.0, 1.0}
    for step in range(1, 6):
        resumed = trainer(tmp_path / f"from {step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        for figure in ("loss", "grad_norm", "on_policy", "completion_length", "entropy", "learning_rate"):
            assert scripts.logged(resumed, figure) == scripts.logged(straight, figure)
        weights = scripts.weights(straight.model)
        assert all(torch.equal(v, weights[key]) for key, v in scripts.weights(resumed.model).items())


# ---- the coin ----


def generations(trainer: GKDTrainer) -> list[int]:
    """The rows of each call of the student's or the teacher's `generate`, as they come."""
    calls: list[int] = []
    for model in (trainer.model, trainer.teacher_model):
        original = model.generate

        def counted(*args: Any, _original: Any = original, **options: Any) -> Any:
            calls.append(len(options["input_ids"]))
            return _original(*args, **options)

        model.generate = counted
    return calls


@pytest.mark.parametrize("build", [scripts.llama, scripts.t5])
def test_lmbda_0_never_samples_and_1_always_does(build: Callable[..., Any], tmp_path: Path) -> None:
    for lmbda, expected in ((0.0, []), (1.0, [2] * 12)):
        trainer = scripts.trainer(
            tmp_path,
            model=build(0),
            teacher=build(1),
            arguments={"lmbda": lmbda, "max_steps": 6, "gradient_accumulation_steps": 2},
        )
        calls = generations(trainer)
        trainer.train()
        assert calls == expected
        assert scripts.logged(trainer, "on_policy") == [lmbda] * 6


def test_each_step_samples_if_and_only_if_its_coin_is_heads(tmp_path: Path) -> None:
    """Asked of the trainer itself, also out of order and after others drew from torch's generator."""
    trainer = made("llama", tmp_path, max_new_tokens=1, seed=3)
    rows, order = rows_of("llama", tiny_examples(1)), torch.randperm(200).tolist()
    seen: dict[float, set[int]] = {}
    calls = generations(trainer)
    for lmbda in (0.1, 0.25, 0.5, 0.9):
        trainer.cells = (replace(trainer.cells[0], lmbda=lmbda),)
        seen[lmbda] = set()
        for step in order:
            torch.rand(1)
            trainer.state.global_step = step
            before = len(calls)
            (sample,), _ = trainer.get_batch_samples(iter([vars(rows)]), 1, torch.device("cpu"))
            assert sample["batch"].on_policy == (len(calls) > before,)
            if len(calls) > before:
                seen[lmbda].add(step)
        assert seen[lmbda] == {step for step in order if is_on_policy(lmbda, 3, step)}
    assert all(low < high for low, high in itertools.pairwise(seen.values())), "monotone in lmbda"


@pytest.mark.parametrize("lmbda", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_the_share_of_steps_on_policy_is_lmbda(lmbda: float, seed: int) -> None:
    """4,000 coins within the interval that a fair one leaves once in 10,000 times."""
    share = sum(is_on_policy(lmbda, seed, step) for step in range(4000))
    low, high = binom.interval(1 - 1e-4, 4000, lmbda)
    assert low <= share <= high
