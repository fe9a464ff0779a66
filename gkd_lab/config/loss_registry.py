"""The registry of loss terms: for each `type` the class that computes it. No torch until one is loaded.

A new term is a file with its loss, a line in `LOSSES` and a test (docs/new_loss_term.md).
"""

import importlib
from typing import Any

LOSSES = {
    "divergence": "gkd_lab.losses.divergence:Divergence",
    "cross_entropy": "gkd_lab.losses.label_losses:CrossEntropy",
    "squared_error": "gkd_lab.losses.squared_error:SquaredError",
    "hidden_states": "gkd_lab.losses.hidden_states:HiddenStateLoss",
    "attentions": "gkd_lab.losses.attentions:AttentionLoss",
    "adversarial": "gkd_lab.losses.adversarial:AdversarialLoss",
    "reward": "gkd_lab.losses.label_losses:RewardLoss",
    "uld": "gkd_lab.losses.uld:ULD",
}
"""Type of a loss term -> `module:class` of its loss, a `gkd_lab.losses.loss.Loss`."""


def load_loss_class(term_type: str) -> Any:
    """Return the loss class of a registered term type; imports its module, and torch with it."""
    module, _, name = LOSSES[term_type].partition(":")
    return getattr(importlib.import_module(module), name)
