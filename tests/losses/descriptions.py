"""Losses and terms from short descriptions."""

from collections.abc import Mapping, Sequence
from typing import Any

from gkd_lab.config.loss_terms import (
    AdversarialConfig,
    AttentionsConfig,
    HiddenStatesConfig,
    ResolvedReward,
    ULDConfig,
)
from gkd_lab.losses.adversarial import AdversarialLoss
from gkd_lab.losses.attentions import AttentionLoss
from gkd_lab.losses.build_terms import parse_terms
from gkd_lab.losses.hidden_states import HiddenStateLoss
from gkd_lab.losses.label_losses import RewardLoss
from gkd_lab.losses.terms import WeightedLosses
from gkd_lab.losses.uld import ULD

DEFAULTS = {"beta": 0.5, "teacher_temperature": 1.0, "student_temperature": 1.0}


def parse(objectives: Sequence[Mapping[str, Any]]) -> WeightedLosses:
    """The terms that `GKDConfig(objectives=...)` has beside its defaults."""
    return parse_terms(objectives, DEFAULTS)


def hidden_state_loss(layers: Any = "uniform", loss: Any = "mse", stack: Any = "decoder") -> HiddenStateLoss:
    return HiddenStateLoss(HiddenStatesConfig(layers=layers, loss=loss, stack=stack))


def attention_loss(layers: Any = "uniform", loss: Any = "mse", stack: Any = "decoder") -> AttentionLoss:
    return AttentionLoss(AttentionsConfig(layers=layers, loss=loss, stack=stack))


def adversarial_loss(**fields: Any) -> AdversarialLoss:
    return AdversarialLoss(AdversarialConfig(**fields))


def reward_loss(name: str, **fields: Any) -> RewardLoss:
    return RewardLoss(ResolvedReward(name=name, **fields))


def uld(student_temperature: float = 1.0, teacher_temperature: float = 1.0) -> ULD:
    config = ULDConfig(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    return ULD(config)
