"""gkd_lab: a research harness for generalized knowledge distillation (Agarwal et al., ICLR 2024).

A *cell* describes one run, a *grid* is cells, running a cell writes a *record*, records make a *table*,
tables make *figures*. Importing this package loads no torch: the trainer is loaded when it is asked for.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["GKDConfig", "GKDTrainer", "Teacher", "__version__"]

if TYPE_CHECKING:
    from gkd_lab.teachers.teacher import Teacher
    from gkd_lab.training.arguments import GKDConfig
    from gkd_lab.training.trainer import GKDTrainer


def __getattr__(name: str) -> Any:
    if name == "GKDTrainer":
        from gkd_lab.training.trainer import GKDTrainer

        return GKDTrainer
    if name == "GKDConfig":
        from gkd_lab.training.arguments import GKDConfig

        return GKDConfig
    if name == "Teacher":
        from gkd_lab.teachers.teacher import Teacher

        return Teacher
    raise AttributeError(f"module 'gkd_lab' has no attribute {name!r}")
