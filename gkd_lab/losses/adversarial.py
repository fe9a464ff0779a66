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

from gkd_lab.config.errors import build_unknown_name_error
from gkd_lab.losses.auxiliary_losses import AuxiliaryLoss, AuxiliaryModule, LossInputs, ModelOutputs
from gkd_lab.losses.discriminator import Discriminator, HiddenStateFeatures, SoftTokenFeatures, TokenFeatures
from gkd_lab.models.rng import derive_seed

WINDOW_SIZES = {"hidden_states": 1, "sequences": 3}
"""What can be read -> how many neighbouring tokens a layer reads: a hidden state knows its context, a
distribution does not."""


@dataclass(frozen=True)
class AdversarialLoss(AuxiliaryLoss):
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
        if self.reads not in WINDOW_SIZES:
            raise build_unknown_name_error("reads of adversarial", self.reads, WINDOW_SIZES)
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

    def create_module(
        self, student: PretrainedConfig, teacher: PretrainedConfig | None, seed: int
    ) -> "AdversarialModule":
        """A discriminator that sees no difference yet: all its scores are 0.

        Raises ValueError where there is no teacher whose forward pass can be read.
        """
        if teacher is None:
            raise ValueError("adversarial reads a teacher's forward pass: give a teacher that runs here")
        generator = torch.Generator().manual_seed(derive_seed(seed, 0, "adversarial"))
        own, its = student.get_text_config(decoder=True), teacher.get_text_config(decoder=True)
        if self.reads == "sequences":
            vocabulary = min(own.vocab_size, its.vocab_size)
            return AdversarialModule(self, SoftTokenFeatures(vocabulary, self.width, generator), generator)
        return AdversarialModule(
            self, HiddenStateFeatures(own.hidden_size, its.hidden_size, generator), generator
        )


OF_GAME = tuple(field.name for field in fields(AdversarialLoss))
"""What an objective of this kind says besides its weight."""


class AdversarialModule(AuxiliaryModule):
    """A cell's discriminator, and what it sees of both passes."""

    def __init__(self, loss: AdversarialLoss, view: TokenFeatures, generator: torch.Generator) -> None:
        super().__init__()
        self.loss, self.view = loss, view
        self.learning_rate = loss.learning_rate
        window = WINDOW_SIZES[loss.reads]
        self.judge = Discriminator(view.width, loss.width, loss.layers, window, generator)
        self._accuracy_sums: dict[str, Tensor] = {}

    def forward(self, inputs: LossInputs) -> Tensor:
        """The student's loss, (); it gives the discriminator no gradient."""
        with freeze_parameters(self):
            return self._student_loss(inputs, inputs.student)

    def parameter_loss(self, inputs: LossInputs) -> Tensor:
        """The discriminator's loss and that of the student's projection, (); no model gets a gradient."""
        student = _detach_outputs(inputs.student)
        if not self.view.learns_with_student:
            return self._discriminator_loss(inputs, student)
        with freeze_parameters(self.view):
            loss = self._discriminator_loss(inputs, student)
        with freeze_parameters(self.judge):
            return loss + self._student_loss(inputs, student)

    def _student_loss(self, inputs: LossInputs, student: ModelOutputs) -> Tensor:
        real = inputs.weights > 0
        scores = self.judge(self.view(student, real, False), real)
        return _weighted_sum(functional.softplus(-scores), inputs)

    def _discriminator_loss(self, inputs: LossInputs, student: ModelOutputs) -> Tensor:
        assert inputs.teacher is not None, "a game has a teacher"
        real, epsilon = inputs.weights > 0, self.loss.label_smoothing
        of_student = self.judge(self.view(student, real, False), real)
        read = self.view(_detach_outputs(inputs.teacher), real, True)
        if not read.requires_grad:
            read.requires_grad_()
        of_teacher = self.judge(read, real)
        taken = (1 - epsilon) * functional.softplus(-of_teacher) + epsilon * functional.softplus(of_teacher)
        loss = _weighted_sum(taken + functional.softplus(of_student), inputs)
        self._add_accuracies(
            inputs,
            accuracy_student=_score_correctness(-of_student),
            accuracy_teacher=_score_correctness(of_teacher),
        )
        if not self.loss.gradient_penalty:
            return loss
        squares = _squared_gradient_norms(of_teacher, read, real)
        return loss + self.loss.gradient_penalty / 2 * _weighted_sum(squares, inputs)

    # ---- whether the game is in balance ----

    def _add_accuracies(self, inputs: LossInputs, **right: Tensor) -> None:
        for name, values in {**right, "share": torch.ones_like(inputs.weights)}.items():
            self._accuracy_sums[name] = self._accuracy_sums.get(name, 0) + _weighted_sum(
                values.double(), inputs
            )

    def collect_logs(
        self, average_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> dict[str, float]:
        """Shares of the student's and of the teacher's tokens that were taken for what they are.

        Of all micro-batches since the last call, of all ranks. Their mean is near a half where the game is in
        balance or has not begun, and near 1 where the student is found out.
        """
        if not self._accuracy_sums:
            return {}
        found = average_over_ranks(torch.stack(list(self._accuracy_sums.values())))
        sums = dict(zip(self._accuracy_sums, found.tolist(), strict=True))
        self._accuracy_sums = {}
        share = sums.pop("share")
        return {name: value / share for name, value in sums.items()} if share else {}


def _weighted_sum(values: Tensor, inputs: LossInputs) -> Tensor:
    """What this micro-batch adds to the mean of values (B, C) over the step's real tokens, ()."""
    weights = inputs.weights.to(values.dtype)
    return (values.masked_fill(weights <= 0, 0) * weights).sum()


def _score_correctness(scores: Tensor) -> Tensor:
    """1 above 0, and a half at 0, which says nothing; no gradient."""
    return (scores.detach().sign() + 1) / 2


def _squared_gradient_norms(scores: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    """|d (sum of scores) / d (what is read of a token)|^2, (B, C), for scores (B, C) of `read` (B, C, W)."""
    total = scores.masked_fill(~mask, 0).sum()
    (gradient,) = torch.autograd.grad(total, features, create_graph=True)
    return gradient.square().sum(-1)


def _detach_outputs(outputs: ModelOutputs) -> ModelOutputs:
    """A pass that takes no gradient."""
    head = outputs.projection
    weight = None if head.weight is None else head.weight.detach()
    bias = None if head.bias is None else head.bias.detach()
    return replace(
        outputs, last_hidden=outputs.last_hidden.detach(), projection=replace(head, weight=weight, bias=bias)
    )


@contextmanager
def freeze_parameters(module: nn.Module) -> Iterator[None]:
    """What is computed within takes the module's parameters for constants."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
