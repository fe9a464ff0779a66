"""Experiment files, grids, cells and fingerprints: the description of runs as pure data."""

from gkd_lab.config.artifact_specs import SftModel, get_artifact_folder
from gkd_lab.config.cell import Cell, Evaluation, Training
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.experiment import SCALES, ExperimentFile, read_experiment
from gkd_lab.config.grid import Grid, expand_grid
from gkd_lab.config.resolve_cell import RevisionLookup
from gkd_lab.config.settings_layers import TaskDefaults

__all__ = [
    "SCALES",
    "Cell",
    "ConfigError",
    "Evaluation",
    "ExperimentFile",
    "Grid",
    "RevisionLookup",
    "SftModel",
    "TaskDefaults",
    "Training",
    "expand_grid",
    "get_artifact_folder",
    "read_experiment",
]
