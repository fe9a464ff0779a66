"""What a run is: experiment files, cells, grids, fingerprints. Pure data; no torch."""

from gkd_lab.config.artifact_specs import SftModel, get_artifact_folder
from gkd_lab.config.cell import Cell, Evaluation, Training
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.experiment import SCALES, Experiment, build_json_schema, read_experiment
from gkd_lab.config.grid import Grid, RevisionLookup, TaskDefaults, expand_grid

__all__ = [
    "SCALES",
    "Cell",
    "ConfigError",
    "Evaluation",
    "Experiment",
    "Grid",
    "RevisionLookup",
    "SftModel",
    "TaskDefaults",
    "Training",
    "build_json_schema",
    "expand_grid",
    "get_artifact_folder",
    "read_experiment",
]
