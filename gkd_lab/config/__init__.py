"""What a run is: experiment files, cells, grids, fingerprints. Pure data; no torch."""

from gkd_lab.config.cell import Cell, Evaluation, SftModel, Training, artifact_folder
from gkd_lab.config.errors import SpecError
from gkd_lab.config.experiment import SCALES, Experiment, json_schema, read_experiment
from gkd_lab.config.grid import GridOfCells, Revisions, TaskDefaults, expand

__all__ = [
    "SCALES",
    "Cell",
    "Evaluation",
    "Experiment",
    "GridOfCells",
    "Revisions",
    "SftModel",
    "SpecError",
    "TaskDefaults",
    "Training",
    "artifact_folder",
    "expand",
    "json_schema",
    "read_experiment",
]
