"""The adversarial term: its losses by plain formulas, whom its gradients reach, and what the game learns."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import GPT2Config

from gkd_lab.config.loss_terms import AdversarialConfig
from gkd_lab.losses import discriminator
from gkd_lab.losses.adversarial import AdversarialLoss, AdversarialModule
from gkd_lab.losses.auxiliary_losses import LossInputs, ModelOutputs
from gkd_lab.losses.build_terms import build_term
from gkd_lab.losses.discriminator import mean_embeddings
from gkd_lab.losses.terms import WeightedLoss
from gkd_lab.models.forward import Sequences
from gkd_lab.models.projection import Projection

from ..training.driving import assert_identical
from .descriptions import adversarial_loss, parse
from .loss_problems import normal

READS = ("hidden_states", "sequences")
LENGTHS = (4, 2, 3)
ROWS, LONGEST, VOCABULARY = 3, 5, 7
STUDENT, TEACHER = 3, 4
LOG_2 = math.log(2)


def config(width: int, vocabulary: int = VOCABULARY) -> GPT2Config:
    return GPT2Config(n_embd=width, vocab_size=vocabulary, n_head=1)


def made_pass(seed: int, width: int) -> ModelOutputs:
    """Random hidden states and head; positions without a token are NaN."""
    last = normal(seed, ROWS, LONGEST, width)
    last[~real()] = torch.nan
    head = Projection(normal(seed + 100, VOCABULARY, width).requires_grad_())
    return ModelOutputs(last.requires_grad_(), {}, config(width), head)


def real() -> Tensor:
    return torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]


def seen(student: ModelOutputs, teacher: ModelOutputs | None) -> LossInputs:
    """Weights that sum to 0.9: a micro-batch is a part of its step."""
    ids = torch.zeros(ROWS, LONGEST, dtype=torch.long)
    weights = normal(5, ROWS, LONGEST).abs() * real()
    rows = Sequences(ids, ids + 1, ids, real().long())
    return LossInputs(rows, student, teacher, 0.9 * weights / weights.sum(), on_policy=False, step=0, seed=0)


def pair(student: int = STUDENT) -> LossInputs:
    return seen(made_pass(1, student), made_pass(2, TEACHER))


def game(measure: AdversarialLoss, student: int = STUDENT, *, spread: float = 1.0) -> AdversarialModule:
    """A discriminator in float64 with scores that differ (at 0 they are as they start)."""
    module = measure.create_module(config(student), config(TEACHER), 0).double()
    assert isinstance(module, AdversarialModule)
    with torch.no_grad():
        module.judge.score.weight.copy_(spread * normal(9, 1, measure.config.width))
        module.judge.score.bias.fill_(0.3 * spread)
    return module


def plain_inputs(module: AdversarialModule, of: ModelOutputs, is_teacher: bool) -> list[Tensor]:
    """Return the discriminator's inputs for each row, (length, W), by plain formulas."""
    found = []
    for row, length in enumerate(LENGTHS):
        hidden = of.last_hidden[row, :length]
        if module.config.reads == "sequences":
            assert of.projection.weight is not None
            distributions = (hidden @ of.projection.weight.T).softmax(-1)
            table = module.view.embedding
            assert isinstance(table, Tensor)
            table = table / table.norm(dim=-1, keepdim=True) * math.sqrt(module.view.width)
            found.append(distributions @ table)
        else:
            if not is_teacher and module.view.projection is not None:
                hidden = hidden @ module.view.projection.weight.T  # type: ignore[union-attr, operator]
            centred = hidden - hidden.mean(-1, keepdim=True)
            found.append(centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    return found


def plain_scores(module: AdversarialModule, read: Tensor) -> Tensor:
    """Scores of one row's tokens, (length, W) -> (length,), token by token."""
    aside = module.judge.window // 2
    for layer in module.judge.hidden:
        outputs = []
        for place in range(len(read)):
            near = [
                read[place + offset] if 0 <= place + offset < len(read) else torch.zeros_like(read[0])
                for offset in range(-aside, aside + 1)
            ]
            raw = layer.weight @ torch.cat(near) + layer.bias  # type: ignore[operator]
            outputs.append(torch.where(raw > 0, raw, 0.2 * raw))
        read = torch.stack(outputs)
    return read @ module.judge.score.weight[0] + module.judge.score.bias


def mean(values: list[Tensor], of: LossInputs) -> Tensor:
    rows = [(v * of.weights[row, : len(v)]).sum() for row, v in enumerate(values)]
    return torch.stack(rows).sum()


def plain_losses(module: AdversarialModule, of: LossInputs) -> tuple[Tensor, Tensor]:
    """The student's and the discriminator's without a penalty, as binary cross-entropies."""
    assert of.teacher is not None
    fake = [plain_scores(module, read) for read in plain_inputs(module, of.student, False)]
    true = [plain_scores(module, read) for read in plain_inputs(module, of.teacher, True)]

    def entropy(scores: Tensor, label: float) -> Tensor:
        p = scores.sigmoid()
        return -(label * p.log() + (1 - label) * (1 - p).log())

    label = 1 - module.config.label_smoothing
    own = [entropy(t, label) + entropy(f, 0) for t, f in zip(true, fake, strict=True)]
    return mean([entropy(f, 1) for f in fake], of), mean(own, of)


# ---- values ----


@pytest.mark.parametrize("reads", READS)
def test_an_untrained_discriminator_is_neutral(reads: str) -> None:
    """Its scores are 0: both losses are those of a coin, and the student gets no push."""
    of = pair(TEACHER)
    module = adversarial_loss(reads=reads).create_module(config(TEACHER), config(TEACHER), 0).double()
    value = module(of)
    assert value.item() == pytest.approx(0.9 * LOG_2)
    value.backward()
    assert of.student.last_hidden.grad is not None
    assert not of.student.last_hidden.grad.any()
    own = module.parameter_loss(of)
    assert own is not None
    assert own.item() == pytest.approx(0.9 * 2 * LOG_2)
    assert module.collect_logs() == {"accuracy_student": 0.5, "accuracy_teacher": 0.5}


def test_losses_of_a_score_of_one_by_hand() -> None:
    """-log sigmoid(1) = 0.313262; -log sigmoid(-1) = 1.313262."""
    module = game(adversarial_loss(gradient_penalty=0), TEACHER, spread=0)
    smooth = game(adversarial_loss(gradient_penalty=0, label_smoothing=0.1), TEACHER, spread=0)
    for one in (module, smooth):
        one.judge.score.bias.data.fill_(1.0)
    of = pair(TEACHER)
    assert module(of).item() == pytest.approx(0.9 * 0.313262, abs=1e-6)
    assert own(module, of).item() == pytest.approx(0.9 * (0.313262 + 1.313262), abs=1e-6)
    smoothed = 0.9 * 0.313262 + 0.1 * 1.313262
    assert own(smooth, of).item() == pytest.approx(0.9 * (smoothed + 1.313262), abs=1e-6)


def own(module: AdversarialModule, of: LossInputs) -> Tensor:
    return module.parameter_loss(of)


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("student", (STUDENT, TEACHER))
@pytest.mark.parametrize("smoothing", (0.0, 0.2))
def test_losses_are_those_of_plain_formulas(reads: str, student: int, smoothing: float) -> None:
    """Padding is NaN here, and neither model reads it."""
    measure = adversarial_loss(reads=reads, gradient_penalty=0, label_smoothing=smoothing, width=6)
    module, of = game(measure, student), pair(student)
    fooling, judging = plain_losses(module, of)
    torch.testing.assert_close(module(of), fooling)
    learns_along = fooling if reads == "hidden_states" and student != TEACHER else 0
    torch.testing.assert_close(own(module, of), judging + learns_along)
    (ours,) = torch.autograd.grad(module(of), [of.student.last_hidden])
    (plain,) = torch.autograd.grad(fooling, [of.student.last_hidden])
    torch.testing.assert_close(ours[real()], plain[real()])
    assert not ours[~real()].any()
    assert ours[real()].any()


@pytest.mark.parametrize("reads", READS)
def test_the_penalty_is_the_squared_gradient_on_the_teacher_s_side(reads: str) -> None:
    """By hand: each row alone, the gradient of the sum of its scores by what is read of each token."""
    of = pair()
    module = game(adversarial_loss(reads=reads, gradient_penalty=0, width=6))
    penalized = game(adversarial_loss(reads=reads, gradient_penalty=4, width=6))
    assert of.teacher is not None
    squares = []
    for read in plain_inputs(module, of.teacher, True):
        leaf = read.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(plain_scores(module, leaf).sum(), leaf)
        squares.append(gradient.square().sum(-1))
    expected = 4 / 2 * mean(squares, of)
    assert expected > 0.01
    torch.testing.assert_close(own(penalized, of) - own(module, of), expected)


@pytest.mark.parametrize("reads", READS)
def test_the_discriminator_s_gradient_is_that_of_its_loss_penalty_included(reads: str) -> None:
    of = pair(TEACHER)
    module = game(adversarial_loss(reads=reads, gradient_penalty=2, label_smoothing=0.1, width=5), TEACHER)
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(own(module, of), parameters)
    assert len(gradients) == 6 + (reads == "sequences")
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = normal(11, *parameter.shape)
        values = []
        for sign in (1, -1):
            parameter.data.add_(sign * 1e-6 * direction)
            values.append(own(module, of).item())
            parameter.data.sub_(sign * 1e-6 * direction)
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("bias", (True, False))
def test_distributions_made_piece_by_piece_are_the_whole_ones(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, embedding = normal(1, 5, STUDENT).requires_grad_(), normal(2, 4, 6).requires_grad_()
    head = Projection(
        normal(3, VOCABULARY, STUDENT).requires_grad_(), normal(4, VOCABULARY) if bias else None, softcap=2.0
    )
    assert head.weight is not None
    inputs = [hidden, embedding, head.weight]
    whole = (head(hidden)[:, :4].softmax(-1) @ embedding).square().sum()
    monkeypatch.setattr(discriminator, "CHUNK_BYTES", 2 * 4 * 8)
    pieces = mean_embeddings(hidden, head, embedding).square().sum()
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(torch.autograd.grad(pieces, inputs), torch.autograd.grad(whole, inputs))
    logits = Projection(None)
    torch.testing.assert_close(
        mean_embeddings(head(hidden), logits, embedding), head(hidden)[:, :4].softmax(-1) @ embedding
    )


def test_what_is_read_does_not_grow_with_the_models() -> None:
    of = pair()
    assert of.teacher is not None
    for reads in READS:
        module = game(adversarial_loss(reads=reads))
        for factor in (1e-6, 1.0, 1e6):
            large = replace(of.teacher, last_hidden=of.teacher.last_hidden * factor)
            read = module.view(large, real(), True)
            assert read.isfinite().all()
            assert (read.norm(dim=-1) <= module.view.width**0.5 * (1 + 1e-9)).all()


@pytest.mark.parametrize("reads", READS)
def test_a_model_in_half_precision_plays_a_discriminator_in_float32(reads: str) -> None:
    """Under autocast hidden states are halves and the head's weight is not."""
    of = pair()
    assert of.teacher is not None
    halves = [
        replace(one, last_hidden=one.last_hidden.detach().bfloat16().requires_grad_())
        for one in (of.student, of.teacher)
    ]
    module = game(adversarial_loss(reads=reads)).float()
    whole = game(adversarial_loss(reads=reads))
    half = replace(of, student=halves[0], teacher=halves[1])
    for ours, exact in ((module(half), whole(of)), (own(module, half), own(whole, of))):
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(exact.item(), rel=0.05)
    module(half).backward()
    assert halves[0].last_hidden.grad is not None
    assert halves[0].last_hidden.grad.isfinite().all()


# ---- whom it reaches ----


@pytest.mark.parametrize("reads", READS)
def test_neither_side_puts_a_gradient_into_the_other(reads: str) -> None:
    of, module = pair(), game(adversarial_loss(reads=reads))
    assert of.teacher is not None
    models = [
        of.student.last_hidden,
        of.student.projection.weight,
        of.teacher.last_hidden,
        of.teacher.projection.weight,
    ]
    module(of).backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert of.student.last_hidden.grad is not None
    head = of.student.projection.weight
    assert head is not None
    assert (head.grad is not None) == (reads == "sequences")
    assert of.teacher.last_hidden.grad is None
    for model in models:
        assert model is not None
        model.grad = None
    own(module, of).backward()
    assert all(model is not None and model.grad is None for model in models)
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_projection_is_on_the_student_s_side() -> None:
    """It gets the gradient of the student's loss, and nothing of the discriminator's."""
    of, module = pair(), game(adversarial_loss())
    assert module.view.projection is not None
    weight = module.view.projection.weight
    assert isinstance(weight, Tensor)
    fooling, _ = plain_losses(module, of)
    (expected,) = torch.autograd.grad(fooling, [weight])
    (found,) = torch.autograd.grad(own(module, of), [weight])
    torch.testing.assert_close(found, expected)


def test_weights_are_drawn_from_the_seed_and_nothing_else() -> None:
    for reads in READS:
        measure = adversarial_loss(reads=reads)
        before = torch.get_rng_state()
        one, same, other = (
            measure.create_module(config(STUDENT), config(TEACHER), s).state_dict() for s in (0, 0, 1)
        )
        assert torch.equal(before, torch.get_rng_state())
        assert_identical(one, same)
        assert not torch.equal(one["judge.hidden.0.weight"], other["judge.hidden.0.weight"])


# ---- the game ----


def learn(module: AdversarialModule, of: LossInputs, steps: int, rate: float = 0.01) -> dict[str, float]:
    """Updates of the discriminator alone; the last one's accuracies."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0)
    for _ in range(steps):
        module.collect_logs()
        optimizer.zero_grad()
        own(module, of).backward()
        optimizer.step()
    return module.collect_logs()


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("held", ({"gradient_penalty": 0.1}, {"gradient_penalty": 0, "label_smoothing": 0.1}))
def test_it_learns_to_tell_two_models_apart(reads: str, held: dict[str, float]) -> None:
    of, module = pair(TEACHER), game(adversarial_loss(reads=reads, **held), TEACHER, spread=0)  # type: ignore[arg-type]
    found = learn(module, of, 150)
    assert found.keys() == {"accuracy_student", "accuracy_teacher"}
    assert min(found.values()) > 0.9
    assert module(of) > 0.9 * 2 * LOG_2


@pytest.mark.parametrize("reads", READS)
def test_equal_models_leave_it_undecided(reads: str) -> None:
    """The equilibrium: no score, no gradient to either side (Mescheder et al. 2018, section 2.1)."""
    one = made_pass(1, TEACHER)
    of, module = seen(one, one), game(adversarial_loss(reads=reads), TEACHER, spread=0)
    assert learn(module, of, 20) == {"accuracy_student": 0.5, "accuracy_teacher": 0.5}
    module(of).backward()
    assert one.last_hidden.grad is not None
    assert one.last_hidden.grad.abs().max() < 1e-12


@pytest.mark.parametrize("smoothing", (0.0, 0.2))
def test_its_best_score_is_the_log_ratio_of_frequencies(smoothing: float) -> None:
    """Two kinds of tokens: p_teacher / (p_teacher + p_student) (Goodfellow et al. 2014, Proposition 1), with
    smoothing (1 - epsilon) p_teacher in the numerator (Salimans et al. 2016, section 3.4)."""
    kinds = torch.tensor([[1.0, 2.0, -1.0, 0.0], [-2.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    rows = Sequences(*[torch.ones(1, 4, dtype=torch.long)] * 4)

    def of_kinds(*which: int) -> ModelOutputs:
        return ModelOutputs(kinds[list(which)][None], {}, config(4), Projection(normal(1, VOCABULARY, 4)))

    weights = torch.full((1, 4), 0.25, dtype=torch.float64)
    of = LossInputs(
        rows, of_kinds(0, 1, 1, 1), of_kinds(0, 0, 0, 1), weights, on_policy=False, step=0, seed=0
    )
    measure = adversarial_loss(gradient_penalty=0, label_smoothing=smoothing)
    module = game(measure, 4, spread=0)
    learn(module, of, 400)
    learn(module, of, 100, rate=1e-4)
    scores = module.judge(module.view(of.student, weights > 0, False), weights > 0)[0]
    best = [(1 - smoothing) * p for p in (0.75, 0.25)]
    torch.testing.assert_close(scores[:2].sigmoid().tolist(), best, atol=2e-3, rtol=0)


def test_a_penalty_keeps_the_scores_of_disjoint_models_near() -> None:
    """Without it they grow on, and the student's gradient with them."""
    of = pair(TEACHER)
    spread = []
    for penalty in (0.0, 1.0, 10.0):
        module = game(adversarial_loss(gradient_penalty=penalty), TEACHER, spread=0)
        learn(module, of, 200)
        spread.append(module(of).item())
    assert spread[0] > 2 * spread[1] > 2 * spread[2]


# ---- what cannot be asked for ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"reads": "hidden_state"},
            "reads: 'hidden_state' .*'hidden_states'",
        ),
        ({"gradient_penalty": -1}, "gradient_penalty: -1"),
        ({"gradient_penalty": "strong"}, "gradient_penalty: 'strong'"),
        ({"label_smoothing": 0.5}, "label_smoothing: 0.5"),
        (
            {"label_smoothing": -0.1},
            "label_smoothing: -0.1",
        ),
        ({"learning_rate": 0}, "learning_rate: 0"),
        ({"width": 0}, "width: 0"),
        ({"layers": 1.5}, "layers: 1.5"),
        ({"depth": 2}, "unknown field .*depth'; .*gradient_penalty"),
    ],
)
def test_a_game_that_cannot_be_played_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse([{}, {"type": "adversarial", **fields}])


@pytest.mark.parametrize(
    "fields", [{"reads": "logits"}, {"gradient_penalty": -1}, {"label_smoothing": 0.5}, {"width": 0}]
)
def test_an_experiment_cannot_ask_for_it_either(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        AdversarialConfig(**fields)


def test_it_needs_a_teacher_that_runs_here_and_states_that_a_head_reads() -> None:
    with pytest.raises(ValueError, match=r"adversarial.*teacher"):
        adversarial_loss().create_module(config(3), None, 0)
    logits = replace(made_pass(1, VOCABULARY), projection=Projection(None))
    with pytest.raises(ValueError, match=r"7 .* student's 3 "):
        game(adversarial_loss())(seen(logits, made_pass(2, TEACHER)))
    wider = adversarial_loss(reads="sequences").create_module(config(3, 9), config(4, 9), 0).double()
    with pytest.raises(ValueError, match=r"7 tokens .* 9"):
        wider(pair())


def test_an_experiment_and_a_configuration_describe_the_same_game() -> None:
    stated = AdversarialConfig(reads="sequences", label_smoothing=0.1, weight=0.2)
    listed = {"type": "adversarial", "reads": "sequences", "label_smoothing": 0.1, "weight": 0.2}
    assert build_term(stated) == parse([listed])[0]
    assert build_term(AdversarialConfig()) == WeightedLoss(adversarial_loss())
