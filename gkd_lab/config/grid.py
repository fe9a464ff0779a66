"""Expand an experiment to a grid of cells: cross its axes, resolve each point, merge equal cells."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from gkd_lab.config.cell import Cell
from gkd_lab.config.errors import ConfigError, build_unknown_name_error, explain_validation_error
from gkd_lab.config.experiment import ExperimentFile, Scale
from gkd_lab.config.fingerprint import SHOWN_DIGITS, canonical_json, compute_fingerprint
from gkd_lab.config.resolve_cell import CellResolver, RevisionLookup
from gkd_lab.config.settings import Settings
from gkd_lab.config.settings_layers import TaskDefaults


@dataclass(frozen=True)
class Grid:
    """The cells of one experiment at one scale, in order."""

    name: str
    scale: str
    experiment: ExperimentFile
    axes: dict[str, tuple[Any, ...]]
    cells: tuple[Cell, ...]
    stands_for: dict[str, tuple[dict[str, Any], ...]]
    """Full fingerprint -> labels of all points that resolved to one cell, where there are several."""
    missing_revisions: str | None = None
    """Sentence on the hub names whose commit is unknown; None: all are known. Such cells have no fingerprint
    to rely on: they can be planned, not run."""

    @property
    def fingerprint(self) -> str:
        """First 8 hexadecimal digits of a hash of scale, axes, cells and their evaluations."""
        cells = [
            [
                cell.full_fingerprint,
                *((evaluation.full_fingerprint, evaluation.metrics) for evaluation in cell.evaluations),
            ]
            for cell in self.cells
        ]
        axes = [*self.axes.items()]
        return compute_fingerprint(canonical_json([self.scale, axes, cells]))[:SHOWN_DIGITS]


def expand_grid(
    name: str,
    experiment: ExperimentFile,
    tasks: Mapping[str, TaskDefaults],
    revisions: RevisionLookup,
    scale: Scale | None = None,
) -> Grid:
    """Return the grid of distinct cells, one per combination of axis values; the first varies slowest.

    Points with equal trainings become one cell. scale: Overrides the experiment's. Raises ConfigError.
    """
    scale = scale or experiment.scale
    axes = _list_axes_with_task(name, experiment, tasks)
    resolver = CellResolver(experiment, tasks, revisions, scale)
    cells: dict[str, Cell] = {}
    labels: dict[str, list[dict[str, Any]]] = {}
    for point in _cross_axes(axes):
        try:
            cell = resolver.resolve_cell(point)
        except ValidationError as error:
            origin = f"{name}: {scale} scale of {point['task']}"
            raise explain_validation_error(error, origin, Settings) from error
        cells.setdefault(cell.full_fingerprint, cell)
        labels.setdefault(cell.full_fingerprint, []).append(point)
    stands_for = {fingerprint: tuple(points) for fingerprint, points in labels.items() if len(points) > 1}
    return Grid(name, scale, experiment, axes, tuple(cells.values()), stands_for)


def _list_axes_with_task(
    name: str, experiment: ExperimentFile, tasks: Mapping[str, TaskDefaults]
) -> dict[str, tuple[Any, ...]]:
    """Return axis -> values; `task` is put first if it is no axis. ConfigError: unknown task or none."""
    axes = experiment.list_axes()
    if "task" not in axes:
        if experiment.task is None:
            raise ConfigError(f"{name}: no task: set `task:` or an axis `grid.task`")
        axes = {"task": (experiment.task,), **axes}
    for task in (*axes["task"], *experiment.per_task):
        if task not in tasks:
            raise build_unknown_name_error("task", task, tasks)
    return axes


def _cross_axes(axes: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Yield every combination of axis values as axis name -> value; the first axis varies slowest."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))
