"""Callbacks of transformers' Trainer that keep parts of a training in step with it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from gkd_lab.losses.auxiliary_modules import AuxiliaryModules

if TYPE_CHECKING:
    from gkd_lab.training.strategies import PackStrategy


class ParameterViewsCallback(TrainerCallback):
    """Keeps a pack's weights and the optimizer's views of them together, and failed cells as they were."""

    def __init__(self, strategy: "PackStrategy") -> None:
        self.strategy = strategy

    def on_train_begin(self, *args: Any, **state: Any) -> None:
        """Point the optimizer's parameters to the weights again: the Trainer may have moved the model."""
        self.strategy.renew_views()

    def on_optimizer_step(self, *args: Any, **state: Any) -> None:
        """Undo what the step did to failed cells."""
        self.strategy.frozen.restore_weights()


class AuxiliaryUpdateCallback(TrainerCallback):
    """Updates the loss's auxiliary modules after each optimizer step, at the same point of the schedule."""

    def __init__(self, modules: AuxiliaryModules, failures: Mapping[int, str]) -> None:
        self.modules, self.failures = modules, failures

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Step the running cells' auxiliary modules, at their learning rate times the schedule's factor."""
        cells, schedule = self.modules.cells, parts["lr_scheduler"]
        rates = {n: cell.learning_rate for n, cell in enumerate(cells) if n not in self.failures}
        if hasattr(schedule, "lr_lambdas"):
            factor = float(schedule.lr_lambdas[0](schedule.last_epoch))
        else:  # No function of the step, such as a plateau: it shows in the rate.
            factor = float(parts["optimizer"].param_groups[0]["lr"]) / (cells[0].learning_rate or 1)
        self.modules.update_modules(rates, factor, args.max_grad_norm or 0.0)
