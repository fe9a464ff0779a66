"""Adversarial loss: a discriminator learns to tell the student's tokens from the teacher's, and the student
learns to mislead it.

The teacher's tokens are the real ones; sigmoid(s) of a token's score s is the probability that it is real:

    discriminator   softplus(-s_teacher) + softplus(s_student) + gamma / 2 |grad s_teacher|^2
    student         softplus(-s_student), the non-saturating loss (Goodfellow et al. 2014, section 3)

gamma is R1, the zero-centred gradient penalty on real tokens (Mescheder et al. 2018, section 4.1). One-sided
label smoothing puts 1 - epsilon in the place of the teacher's label 1 (Salimans et al. 2016, section 3.4).
Shapes: B rows, C completion tokens, W features of a token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from gkd_lab.config.loss_terms import AdversarialConfig
from gkd_lab.losses.auxiliary_losses import AuxiliaryLoss, AuxiliaryModule, LossInputs, ModelOutputs
from gkd_lab.losses.discriminator import Discriminator, HiddenStateFeatures, SoftTokenFeatures, TokenFeatures
from gkd_lab.models.rng import derive_seed

WINDOW_SIZES = {"hidden_states": 1, "sequences": 3}
"""Input of the discriminator -> number of neighbouring tokens that a layer reads: a hidden state contains its
context, a distribution does not."""


@dataclass(frozen=True)
class AdversarialLoss(AuxiliaryLoss):
    """A discriminator against the student; its settings are those of `AdversarialConfig`.

    `reads: hidden_states`: what the output heads read, each token by itself; `sequences`: distributions over
    tokens, as softmax(logits) times a learnt embedding, with those of `layers` tokens to either side. The
    larger the weight of the term, the larger `gradient_penalty` has to be for the game to stay in balance
    (docs/family.md). The discriminator makes one AdamW update a step.
    """

    config: AdversarialConfig

    config_class = AdversarialConfig
    log_name = "adversarial"

    def create_module(
        self, student: PretrainedConfig, teacher: PretrainedConfig | None, seed: int
    ) -> "AdversarialModule":
        """Return a new discriminator module for one cell; its scores are all 0 at first.

        Raises ValueError without a teacher whose forward pass can be read.
        """
        if teacher is None:
            raise ValueError("adversarial reads a teacher's forward pass: give a teacher that runs here")
        generator = torch.Generator().manual_seed(derive_seed(seed, 0, "adversarial"))
        student_text, teacher_text = (model.get_text_config(decoder=True) for model in (student, teacher))
        features: TokenFeatures
        if self.config.reads == "sequences":
            vocabulary = min(student_text.vocab_size, teacher_text.vocab_size)
            features = SoftTokenFeatures(vocabulary, self.config.width, generator)
        else:
            features = HiddenStateFeatures(student_text.hidden_size, teacher_text.hidden_size, generator)
        return AdversarialModule(self.config, features, generator)


class AdversarialModule(AuxiliaryModule):
    """Computes the adversarial loss of one cell; its discriminator learns.

    view: the features that the discriminator, `judge`, reads; both names are those of checkpoints.
    """

    def __init__(self, config: AdversarialConfig, view: TokenFeatures, generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.view = config, view
        self.learning_rate = config.learning_rate
        window = WINDOW_SIZES[config.reads]
        self.judge = Discriminator(view.width, config.width, config.layers, window, generator)
        self._accuracy_sums: dict[str, Tensor] = {}

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the student's loss, sum(weight * softplus(-score)), (); the module gets no gradient."""
        with freeze_parameters(self):
            return self._student_loss(inputs, inputs.student)

    def parameter_loss(self, inputs: LossInputs) -> Tensor:
        """Return the loss, (), that trains the module's parameters alone: both models are detached.

        The discriminator learns its own loss; a projection, if there is one, learns the student's.
        """
        student = _detach_outputs(inputs.student)
        if not self.view.learns_with_student:
            return self._discriminator_loss(inputs, student)
        with freeze_parameters(self.view):
            loss = self._discriminator_loss(inputs, student)
        with freeze_parameters(self.judge):
            return loss + self._student_loss(inputs, student)

    def _student_loss(self, inputs: LossInputs, student: ModelOutputs) -> Tensor:
        """Return sum(weight * softplus(-score)) over the student's tokens, (): low if scored as real."""
        mask = inputs.weights > 0
        scores = self.judge(self.view(student, mask, False), mask)
        return _weighted_sum(functional.softplus(-scores), inputs)

    def _discriminator_loss(self, inputs: LossInputs, student: ModelOutputs) -> Tensor:
        """Return the discriminator's loss on both models' tokens, (), with R1 penalty; count its hits."""
        assert inputs.teacher is not None, "create_module has refused to do without a teacher"
        mask, epsilon = inputs.weights > 0, self.config.label_smoothing
        student_scores = self.judge(self.view(student, mask, False), mask)
        features = self.view(_detach_outputs(inputs.teacher), mask, True)
        if not features.requires_grad:
            features.requires_grad_()
        teacher_scores = self.judge(features, mask)
        teacher_loss = (1 - epsilon) * functional.softplus(-teacher_scores)
        teacher_loss = teacher_loss + epsilon * functional.softplus(teacher_scores)
        loss = _weighted_sum(teacher_loss + functional.softplus(student_scores), inputs)
        self._add_accuracies(
            inputs,
            accuracy_student=_score_correctness(-student_scores),
            accuracy_teacher=_score_correctness(teacher_scores),
        )
        if not self.config.gradient_penalty:
            return loss
        squares = _squared_gradient_norms(teacher_scores, features, mask)
        return loss + self.config.gradient_penalty / 2 * _weighted_sum(squares, inputs)

    def _add_accuracies(self, inputs: LossInputs, **correct: Tensor) -> None:
        """Add a micro-batch's weighted correct decisions, (B, C) each, to sums for `collect_logs`."""
        for name, values in {**correct, "share": torch.ones_like(inputs.weights)}.items():
            previous = self._accuracy_sums.get(name, 0)
            self._accuracy_sums[name] = previous + _weighted_sum(values.double(), inputs)

    def collect_logs(
        self, average_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> dict[str, float]:
        """Return the shares of student's and teacher's tokens that the discriminator got right; reset them.

        Keys: accuracy_student and accuracy_teacher, over all micro-batches since the last call, of all ranks;
        {} without any. Their mean is near a half where the game is in balance or has not begun, and near 1
        where the discriminator wins.
        """
        if not self._accuracy_sums:
            return {}
        averages = average_over_ranks(torch.stack(list(self._accuracy_sums.values())))
        sums = dict(zip(self._accuracy_sums, averages.tolist(), strict=True))
        self._accuracy_sums = {}
        share = sums.pop("share")
        return {name: value / share for name, value in sums.items()} if share else {}


def _weighted_sum(values: Tensor, inputs: LossInputs) -> Tensor:
    """Return sum(weights * values) of values (B, C), (); added up over a step it is the mean over tokens."""
    weights = inputs.weights.to(values.dtype)
    return (values.masked_fill(weights <= 0, 0) * weights).sum()


def _score_correctness(scores: Tensor) -> Tensor:
    """Return, elementwise and detached, 1 for a positive score, 0 for a negative one and 1/2 for 0."""
    return (scores.detach().sign() + 1) / 2


def _squared_gradient_norms(scores: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    """Return each token's squared gradient norm |d sum(scores) / d features|^2, (B, C), differentiably.

    features: (B, C, W), of which scores (B, C) were computed.
    """
    total = scores.masked_fill(~mask, 0).sum()
    (gradient,) = torch.autograd.grad(total, features, create_graph=True)
    return gradient.square().sum(-1)


def _detach_outputs(outputs: ModelOutputs) -> ModelOutputs:
    """Return a copy with last hidden states and head detached; extra outputs are left as they are."""
    head = outputs.projection
    weight = None if head.weight is None else head.weight.detach()
    bias = None if head.bias is None else head.bias.detach()
    return replace(
        outputs, last_hidden=outputs.last_hidden.detach(), projection=replace(head, weight=weight, bias=bias)
    )


@contextmanager
def freeze_parameters(module: nn.Module) -> Iterator[None]:
    """Turn off requires_grad of the module's trainable parameters within the context; restore it after."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
