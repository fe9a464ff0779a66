"""An adversarial term: a discriminator learns to tell the student's tokens from the teacher's, the student to
pass for the teacher.

The teacher is what is real. A token's score s says by sigmoid(s) how surely the teacher made it:

    discriminator   softplus(-s_teacher) + softplus(s_student) + gamma / 2 |grad s_teacher|^2
    student         softplus(-s_student), the non-saturating loss (Goodfellow et al. 2014, section 3)

gamma is R1, the zero-centred gradient penalty on what is real (Mescheder et al. 2018, section 4.1). One-sided
label smoothing puts 1 - epsilon in the place of the teacher's label 1 (Salimans et al. 2016, section 3.4).
Shapes: B rows, C completion tokens, W numbers read of a token.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from gkd_lab.config.errors import unknown
from gkd_lab.losses.auxiliary_losses import Pass, Seen, StepMeasure, StepModule
from gkd_lab.losses.discriminator import Discriminator, SoftTokens, States, View
from gkd_lab.models.rng import key

WINDOWS = {"hidden_states": 1, "sequences": 3}
"""What can be read -> how many neighbouring tokens a layer reads: a hidden state knows its context, a
distribution does not."""


@dataclass(frozen=True)
class Adversarial(StepMeasure):
    """What the discriminator reads, and how it is built and held back.

    reads: `hidden_states`: what the output heads read, each token by itself; `sequences`: distributions over
        tokens, as softmax(logits) times a learnt embedding, with those of `layers` tokens to either side.
    gradient_penalty: gamma, 10 as in the source; 0: none. The larger the weight of the term, the larger it
        has to be for the game to hold (docs/family.md). label_smoothing: epsilon, in [0, 0.5).
    learning_rate: of the discriminator's own AdamW, before the schedule; it makes one update a step.
    width, layers: of its hidden layers.

    Raises ValueError for an unknown `reads` and for numbers outside of their range.
    """

    kind: ClassVar[str] = "adversarial"

    reads: str = "hidden_states"
    gradient_penalty: float = 10.0
    label_smoothing: float = 0.0
    learning_rate: float = 1e-3
    width: int = 64
    layers: int = 2

    def __post_init__(self) -> None:
        if self.reads not in WINDOWS:
            raise unknown("reads of adversarial", self.reads, WINDOWS)
        for name in ("gradient_penalty", "label_smoothing", "learning_rate"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} {getattr(self, name)!r} of adversarial must be a number")
        for name in ("width", "layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r} of adversarial must be a whole number from 1")
        if not 0 <= self.gradient_penalty < math.inf:
            raise ValueError(f"gradient_penalty {self.gradient_penalty} must be a number from 0; 0: none")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing {self.label_smoothing} is taken from the teacher's label 1, which stays "
                "above a half: choose it in [0, 0.5)"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate {self.learning_rate} of adversarial must be a positive number")

    def module(self, student: PretrainedConfig, teacher: PretrainedConfig | None, seed: int) -> "Game":
        """A discriminator that sees no difference yet: all its scores are 0.

        Raises ValueError where there is no teacher whose forward pass can be read.
        """
        if teacher is None:
            raise ValueError("adversarial reads a teacher's forward pass: give a teacher that runs here")
        generator = torch.Generator().manual_seed(key(seed, 0, "adversarial"))
        own, its = student.get_text_config(decoder=True), teacher.get_text_config(decoder=True)
        if self.reads == "sequences":
            vocabulary = min(own.vocab_size, its.vocab_size)
            return Game(self, SoftTokens(vocabulary, self.width, generator), generator)
        return Game(self, States(own.hidden_size, its.hidden_size, generator), generator)


OF_GAME = tuple(field.name for field in fields(Adversarial))
"""What an objective of this kind says besides its weight."""


class Game(StepModule):
    """A cell's discriminator, and what it sees of both passes."""

    def __init__(self, measure: Adversarial, view: View, generator: torch.Generator) -> None:
        super().__init__()
        self.measure, self.view = measure, view
        self.learning_rate = measure.learning_rate
        window = WINDOWS[measure.reads]
        self.judge = Discriminator(view.width, measure.width, measure.layers, window, generator)
        self._sums: dict[str, Tensor] = {}

    def forward(self, seen: Seen) -> Tensor:
        """The student's loss, (); it gives the discriminator no gradient."""
        with fixed(self):
            return self._fooling(seen, seen.student)

    def own_loss(self, seen: Seen) -> Tensor:
        """The discriminator's loss and that of the student's projection, (); no model gets a gradient."""
        student = _detached(seen.student)
        if not self.view.helps_student:
            return self._judging(seen, student)
        with fixed(self.view):
            loss = self._judging(seen, student)
        with fixed(self.judge):
            return loss + self._fooling(seen, student)

    def _fooling(self, seen: Seen, student: Pass) -> Tensor:
        real = seen.weights > 0
        scores = self.judge(self.view(student, real, False), real)
        return _mean(functional.softplus(-scores), seen)

    def _judging(self, seen: Seen, student: Pass) -> Tensor:
        assert seen.teacher is not None, "a game has a teacher"
        real, epsilon = seen.weights > 0, self.measure.label_smoothing
        of_student = self.judge(self.view(student, real, False), real)
        read = self.view(_detached(seen.teacher), real, True)
        if not read.requires_grad:
            read.requires_grad_()
        of_teacher = self.judge(read, real)
        taken = (1 - epsilon) * functional.softplus(-of_teacher) + epsilon * functional.softplus(of_teacher)
        loss = _mean(taken + functional.softplus(of_student), seen)
        self._note(seen, accuracy_student=_right(-of_student), accuracy_teacher=_right(of_teacher))
        if not self.measure.gradient_penalty:
            return loss
        squares = _squared_gradients(of_teacher, read, real)
        return loss + self.measure.gradient_penalty / 2 * _mean(squares, seen)

    # ---- whether the game is in balance ----

    def _note(self, seen: Seen, **right: Tensor) -> None:
        for name, values in {**right, "share": torch.ones_like(seen.weights)}.items():
            self._sums[name] = self._sums.get(name, 0) + _mean(values.double(), seen)

    def logged(self, over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Shares of the student's and of the teacher's tokens that were taken for what they are.

        Of all micro-batches since the last call, of all ranks. Their mean is near a half where the game is in
        balance or has not begun, and near 1 where the student is found out.
        """
        if not self._sums:
            return {}
        found = over_ranks(torch.stack(list(self._sums.values())))
        sums = dict(zip(self._sums, found.tolist(), strict=True))
        self._sums = {}
        share = sums.pop("share")
        return {name: value / share for name, value in sums.items()} if share else {}


def _mean(values: Tensor, seen: Seen) -> Tensor:
    """What this micro-batch adds to the mean of values (B, C) over the step's real tokens, ()."""
    weights = seen.weights.to(values.dtype)
    return (values.masked_fill(weights <= 0, 0) * weights).sum()


def _right(scores: Tensor) -> Tensor:
    """1 above 0, and a half at 0, which says nothing; no gradient."""
    return (scores.detach().sign() + 1) / 2


def _squared_gradients(scores: Tensor, read: Tensor, real: Tensor) -> Tensor:
    """|d (sum of scores) / d (what is read of a token)|^2, (B, C), for scores (B, C) of `read` (B, C, W)."""
    total = scores.masked_fill(~real, 0).sum()
    (gradient,) = torch.autograd.grad(total, read, create_graph=True)
    return gradient.square().sum(-1)


def _detached(of: Pass) -> Pass:
    """A pass that takes no gradient."""
    head = of.projection
    weight = None if head.weight is None else head.weight.detach()
    bias = None if head.bias is None else head.bias.detach()
    return replace(of, last=of.last.detach(), projection=replace(head, weight=weight, bias=bias))


@contextmanager
def fixed(module: nn.Module) -> Iterator[None]:
    """What is computed within takes the module's parameters for constants."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
