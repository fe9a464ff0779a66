"""gkd_lab: a research harness for generalized knowledge distillation (Agarwal et al., ICLR 2024).

A *cell* describes one run, a *grid* is cells, running a cell writes a *record*, records make a *table*,
tables make *figures*. Importing this package loads no torch: the trainer is loaded when it is asked for.

    load      an experiment by name or file, with other values   -> Experiment
    run       what of it is not done                             -> Outcome
    table     the scores of an experiment, or a parquet file     -> DataFrame, a row per score (long)
    wide      a long table with a row per model                  -> DataFrame
    summary   means over seeds with intervals                    -> DataFrame
    judge     which claims of the paper hold in a table          -> DataFrame
    heat_map, curves   a metric of a table                       -> matplotlib Figure
    GKDTrainer, GKDConfig   TRL's trainer with its bugs fixed
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Experiment", "GKDConfig", "GKDTrainer", "Outcome", "Teacher", "__version__", "curves", "heat_map",
    "judge", "load", "run", "summary", "table", "wide",
]  # fmt: skip

if TYPE_CHECKING:
    from gkd_lab.claims.judge import judge
    from gkd_lab.experiments import Experiment
    from gkd_lab.experiments import load_experiment as load
    from gkd_lab.figures.heat_maps import heat_map
    from gkd_lab.figures.score_curves import curves
    from gkd_lab.runner.run_experiment import Outcome
    from gkd_lab.runner.run_experiment import run_experiment as run
    from gkd_lab.statistics.summaries import summary
    from gkd_lab.tables.load_table import load_table as table
    from gkd_lab.tables.wide_table import wide
    from gkd_lab.teachers.teacher import Teacher
    from gkd_lab.training.arguments import GKDConfig
    from gkd_lab.training.trainer import GKDTrainer

_PUBLIC_NAMES = {
    "GKDTrainer": ("gkd_lab.training.trainer", "GKDTrainer"),
    "GKDConfig": ("gkd_lab.training.arguments", "GKDConfig"),
    "Teacher": ("gkd_lab.teachers.teacher", "Teacher"),
    "Experiment": ("gkd_lab.experiments", "Experiment"),
    "Outcome": ("gkd_lab.runner.run_experiment", "Outcome"),
    "load": ("gkd_lab.experiments", "load_experiment"),
    "run": ("gkd_lab.runner.run_experiment", "run_experiment"),
    "judge": ("gkd_lab.claims.judge", "judge"),
    "table": ("gkd_lab.tables.load_table", "load_table"),
    "wide": ("gkd_lab.tables.wide_table", "wide"),
    "summary": ("gkd_lab.statistics.summaries", "summary"),
    "heat_map": ("gkd_lab.figures.heat_maps", "heat_map"),
    "curves": ("gkd_lab.figures.score_curves", "curves"),
}
"""Public name -> module and name in it; a module is imported when one of its names is asked for."""


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module 'gkd_lab' has no attribute {name!r}")
    module, attribute = _PUBLIC_NAMES[name]
    return getattr(import_module(module), attribute)
