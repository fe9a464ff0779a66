"""Losses whose targets are tokens: cross-entropy, and the policy gradient of a reward.

Shapes: N tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gkd_lab.config.loss_terms import CrossEntropyConfig, ResolvedReward
from gkd_lab.losses.divergence import log_probabilities
from gkd_lab.losses.loss import LabelLoss


@dataclass(frozen=True)
class CrossEntropy(LabelLoss):
    """-log q of the token that is there: the hard labels of Hinton et al. (2015), Sequence KD's loss
    (Kim and Rush 2016), and that of supervised fine-tuning.
    """

    config_class = CrossEntropyConfig
    log_name = "cross_entropy"
    takes_cell_axis = True

    @classmethod
    def build(cls, config: CrossEntropyConfig) -> "CrossEntropy":
        """Return the loss, which has no settings of its own."""
        return cls()

    def __call__(self, student_logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Return the value of each token, (N,), by autograd: the reference."""
        logs = log_probabilities(student_logits_NV)
        return functional.nll_loss(logs, labels_N, reduction="none")

    @torch.no_grad()
    def value_and_gradient(
        self, student_logits_NV: Tensor, labels_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return -log q of each label, (N,), its gradient, (N, V), and the entropy, (N,); no autograd."""
        logs = log_probabilities(student_logits_NV)
        q, label = logs.exp(), labels_N[..., None]
        value = -logs.gather(-1, label)[..., 0]
        entropy = -(q * logs).sum(-1)
        return value, q.scatter_add_(-1, label, q.new_full(label.shape, -1.0)), entropy


@dataclass(frozen=True)
class RewardLoss(LabelLoss):
    """-log q of the tokens that the student sampled: the first term of Eq. 5 by REINFORCE.

    The `scales` of a micro-batch multiply it by the advantage of the token's sequence
    (`gkd_lab.losses.policy_gradient`).
    """

    config: ResolvedReward

    config_class = ResolvedReward
    log_name = "reward"
    takes_cell_axis = True
    on_policy = True

    @property
    def function_key(self) -> tuple[str, str | None, str | None]:
        """(Reward's name, model or folder, revision): equal keys share one loaded reward function."""
        config = self.config
        # A folder has no revision: its content is what is loaded.
        return config.name, config.path or config.model, config.revision if config.model else None

    def value_and_gradient(
        self, student_logits_NV: Tensor, labels_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return cross-entropy's values, gradient and entropy; the advantage comes as a scale, not here."""
        return CrossEntropy().value_and_gradient(student_logits_NV, labels_N)
