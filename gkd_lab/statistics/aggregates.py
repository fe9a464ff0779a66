"""Scores of one method over several tasks: interquartile means and performance profiles.

As Agarwal et al. (2021) do, scores are normalised by task and averaged without the lowest and the highest
quarter. Their percentile bootstrap covers 84 to 88 % with three seeds a task; here its standard error is
corrected for the number of seeds and used with Student's t (docs/log.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gkd_lab.statistics.noise import Array, EffectEstimate, compute_t_quantile
from gkd_lab.statistics.summaries import expand_collapsed_cells
from gkd_lab.tables.divergences import get_divergence
from gkd_lab.tables.long_table import list_axes
from gkd_lab.tables.loss_labels import (
    GKD_METHODS,
    METHOD_NAMES,
    format_axis_setting,
    format_method,
    loss_label,
)

METHOD_AXES = ("method", "objectives")
"""Axes that tell methods apart, where a grid declares them; its others are further settings of a task."""
BASELINES = "Baselines"
TRIMMED_SHARE = 0.25
RESAMPLES = 1000


@dataclass(frozen=True)
class MethodScores:
    """Normalised scores of one method, or one lmbda and divergence: 0 is the SFT student, 1 the teacher."""

    settings: dict[str, Any]
    """`lmbda`, `divergence`, `beta`, and `method` or `objectives` where these are axes."""
    strata: list[Array]
    """(S,) scores of the seeds of each task, or of each setting of it."""

    @property
    def group(self) -> str:
        """Heading that it stands under: `Baselines`, `On-policy GKD`; without an axis `method` `λ = 0.5`."""
        method = self.settings.get("method")
        if method is None:
            return f"λ = {self.settings['lmbda']:g}"
        return METHOD_NAMES[method] if method in GKD_METHODS else BASELINES

    @property
    def name(self) -> str:
        """Name within its group: the method, the loss or the divergence."""
        if "objectives" in self.settings:
            return loss_label(self.settings["objectives"])
        divergence = get_divergence(self.settings).label
        return format_method(self.settings["method"], divergence) if self.group == BASELINES else divergence

    @property
    def label(self) -> str:
        """Name in full: `ImitKD`, `On-policy GKD, JSD(0.1)`, `λ = 0.5, JSD(0.1)`."""
        return self.name if self.group == BASELINES else f"{self.group}, {self.name}"

    def estimate_interquartile_mean(self) -> EffectEstimate:
        """Estimate the mean of the middle half of all scores; the interval covers seeds within tasks."""
        seeds = min(map(len, self.strata))
        mean = compute_interquartile_mean(np.concatenate(self.strata))
        method = f"{len(self.strata)} tasks x {seeds} seeds, stratified bootstrap"
        # Half of the scores count.
        degrees = max(1.0, sum(len(scores) - 1 for scores in self.strata) / 2)
        error = None if seeds < 2 else float(_bootstrap_interquartile_means(self.strata).std())
        return EffectEstimate(mean, mean, mean, error, degrees, seeds, None, method)

    def compute_profile(self, thresholds: Array) -> tuple[Array, Array, Array]:
        """Return the share of scores above each threshold, averaged over tasks, and its 95 % band.

        The band is pointwise, over seeds within tasks: the share itself where there is one seed.
        """
        shares = np.array([(scores > thresholds[:, None]).mean(axis=1) for scores in self.strata])
        counts = np.array([[max(len(scores) - 1, 1)] for scores in self.strata])
        error = np.sqrt((shares * (1 - shares) / counts).sum(axis=0)) / len(self.strata)
        degrees = max(1.0, float(sum(len(scores) - 1 for scores in self.strata)))
        share, width = shares.mean(axis=0), compute_t_quantile(0.025, degrees) * error
        return share, np.maximum(share - width, 0), np.minimum(share + width, 1)


@dataclass(frozen=True)
class AggregatedScores:
    """All methods that have a score in every task, in the order of the table."""

    methods: list[MethodScores]
    tasks: list[str]
    """Names of the tasks, with their further settings."""
    omitted: list[str]
    """What was left out, and why."""
    missing: list[str]
    """Each score that keeps a method out, as `METHOD in TASK`."""


def compute_interquartile_mean(scores: Array) -> float:
    """Return the mean of the middle half of all scores."""
    return float(_average_middle(scores.ravel()))


def _average_middle(scores: Array) -> Array:
    """Return the mean over the last axis without the lowest and the highest `TRIMMED_SHARE` of the scores.

    The same numbers as `scipy.stats.trim_mean`, a module that takes longer to load than all intervals do.
    """
    count = scores.shape[-1]
    cut = int(TRIMMED_SHARE * count)
    middle = np.partition(scores, (cut, count - cut - 1), axis=-1)[..., cut : count - cut]
    mean: Array = middle.mean(axis=-1)
    return mean


def aggregate_scores(scores: pd.DataFrame) -> AggregatedScores:
    """Normalise the rows of `select_primary_scores` and group them by method and by task.

    A task with several values of other axes, such as students of several sizes, counts as several. Tasks
    whose teacher is no better than the SFT student cannot be normalised; methods without a score in some task
    are not averaged over fewer. Both are named in `omitted`.
    """
    cells = _normalize(scores)
    usable = cells[cells["normalized"].notna()]
    tasks = list(usable["stratum"].unique())
    omitted = [
        f"{name}: the teacher, the SFT student or all scores are missing, or the teacher is no better"
        for name in cells["stratum"].unique()
        if name not in tasks
    ]
    keys = ["lmbda", "divergence", "beta", *(axis for axis in METHOD_AXES if axis in list_axes(scores))]
    methods, missing_scores = [], []
    for values, group in usable.groupby(keys, dropna=False, sort=False):
        strata = [group.loc[group["stratum"] == task, "normalized"].to_numpy(float) for task in tasks]
        method = MethodScores(dict(zip(keys, values, strict=True)), strata)
        if all(map(len, strata)):
            methods.append(method)
        else:
            missing = [task for task, stratum in zip(tasks, strata, strict=True) if not len(stratum)]
            omitted.append(f"{method.label}: no score in {', '.join(missing)}")
            missing_scores += [f"{method.label} in {task}" for task in missing]
    return AggregatedScores(methods, tasks, omitted, missing_scores)


def _normalize(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the cells with `stratum`, and `normalized`: NaN without a teacher above the SFT student.

    A cell stands once in each stratum, under the first of its names.
    """
    cells = expand_collapsed_cells(scores)
    axes = [axis for axis in list_axes(scores) if axis not in METHOD_AXES]
    varying = [axis for axis in axes if cells[axis].nunique(dropna=False) > 1]
    stratum = [_name_stratum(row, varying) for row in cells[["task", *varying]].to_dict("records")]
    references = scores[scores["role"] != "cell"].drop_duplicates(["role", "cell"])
    start, teacher = (
        cells[f"{role}_cell"].map(references[references["role"] == role].set_index("cell")["value"])
        for role in ("start", "teacher")
    )
    normalized = (cells["value"] - start) / (teacher - start).where(teacher > start)
    cells = cells.assign(stratum=stratum, normalized=normalized.astype(float))
    return cells.drop_duplicates(["cell", "stratum"])


def _name_stratum(row: dict[Any, Any], axes: Sequence[str]) -> str:
    """Return a task's name with the values of other axes."""
    settings = [format_axis_setting(axis, row[axis]) for axis in axes if not _is_missing(row[axis])]
    return ", ".join([str(row["task"]), *settings])


def _is_missing(value: Any) -> bool:
    """Return whether a value is None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _bootstrap_interquartile_means(strata: Sequence[Array]) -> Array:
    """Return (R,) interquartile means of seeds drawn with replacement within each stratum.

    Deviations from a stratum's mean are stretched by sqrt(S / (S - 1)): drawn from S seeds they vary less
    than the seeds do.
    """
    generator = np.random.default_rng(0)
    drawn = []
    for scores in strata:
        count = len(scores)
        stretched = scores.mean() + math.sqrt(count / (count - 1)) * (scores - scores.mean())
        drawn.append(stretched[generator.integers(count, size=(RESAMPLES, count))])
    return _average_middle(np.concatenate(drawn, axis=1))
