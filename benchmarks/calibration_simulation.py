"""Simulated scores of known truth for `calibration.py`, judged in several processes.

Score of model m, seed s, example n = mean_m + seed_ms + difficulty_n + method_mn + example_msn, in points.
A right-or-wrong score is 100 where a normal variable built of the same parts lies below the quantile of the
mean, so that its mean is exact. Nothing here imports gkd_lab: an older checkout judges the same scores.
"""

import math
import multiprocessing
import os
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Distribution = Literal["normal", "skewed", "heavy-tailed seeds", "right or wrong"]

DIFFICULTY_SD = 15.0
"""Points by which examples differ for all models alike."""
BLOCK = 50
"""Tables that a process judges at once; each block has a generator of its own."""


@dataclass(frozen=True)
class Noise:
    """Standard deviations in points, or in parts of a latent variable for right-or-wrong scores."""

    seeds: float = 0.0
    """Of a model's score from one seed to another."""
    examples: float = 0.0
    """Of one example, different for every model and seed."""
    method: float = 0.0
    """Of one example, different for every model and equal for its seeds (method x example)."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model with its true score in points and the settings that claims read."""

    mean: float
    settings: Mapping[str, Any]
    noise_scale: float = 1.0
    """Factor of the noise of seeds."""

    @property
    def is_reference(self) -> bool:
        """Whether all seeds share it (an SFT student or a teacher)."""
        return self.settings.get("role", "cell") != "cell"


@dataclass(frozen=True, eq=False)
class Case:
    """Tables of one truth, judged by one claim."""

    name: str
    claim: str
    models: tuple[Model, ...]
    seeds: int
    noise: Noise
    effect: float = 0.0
    """True least effect in points; the claim is true where it lies above minus the margin."""
    margin: float = 0.0
    has_examples: bool = False
    """Whether the judge gets the scores of examples."""
    examples: int = 200
    distribution: Distribution = "normal"
    seed_correlation: float = 0.0
    """Between models that are one training, evaluated under several settings."""
    has_power: bool = False
    """Whether `holds` has to be found in 80 % of the tables."""
    is_plain: bool = False
    """Whether it is a plain difference with all noises, whose coverage has an upper limit."""
    is_stress: bool = False
    """Whether it has no limits: the judge is not told what it needs, or the truth was searched for."""

    @property
    def is_measurement(self) -> bool:
        """Whether the claim has an interval and no verdict."""
        return self.claim in ("C26", "C27", "C28")


class Judged(NamedTuple):
    """A verdict on one table; `low` and `high` are NaN without interval."""

    verdict: str
    effect: float
    low: float
    high: float


Judge = Callable[[Case, Array, Array | None], Judged]
"""Judges (M, S) scores, with (M, S, N) scores of examples or None."""


# ---- scores ----


def simulate_scores(case: Case, generator: np.random.Generator) -> tuple[Array, Array | None]:
    """Return (M, S) scores in points and, where the judge gets them, (M, S, N) scores of examples."""
    models, seeds = len(case.models), case.seeds
    seed_noise = _draw_seed_noise(case, generator)
    if case.distribution == "right or wrong":
        examples = _simulate_right_or_wrong(case, seed_noise, generator)
        return examples.mean(axis=2), examples if case.has_examples else None
    scores = np.array([model.mean for model in case.models])[:, None] + seed_noise
    if not case.has_examples:
        shared = generator.standard_normal((models, 1)) * case.noise.method / math.sqrt(case.examples)
        single = generator.standard_normal((models, seeds)) * case.noise.examples / math.sqrt(case.examples)
        return scores + shared + single, None
    count = case.examples
    examples = scores[:, :, None] + DIFFICULTY_SD * _draw_example_noise(case, (1, 1, count), generator)
    if case.noise.method:
        examples += case.noise.method * _draw_example_noise(case, (models, 1, count), generator)
    if case.noise.examples:
        examples += case.noise.examples * _draw_example_noise(case, (models, seeds, count), generator)
    for index, model in enumerate(case.models):
        if model.is_reference:
            examples[index] = examples[index, :1]
    return examples.mean(axis=2), examples


def _draw_seed_noise(case: Case, generator: np.random.Generator) -> Array:
    """Return the (M, S) noise of seeds, in the unit of `case.noise`; a t with 2 degrees is not rescaled."""
    shape = (len(case.models), case.seeds)
    is_heavy = case.distribution == "heavy-tailed seeds"
    draws = generator.standard_t(2, shape) if is_heavy else generator.standard_normal(shape)
    if case.seed_correlation:
        trainings = [str(model.settings["beta"]) for model in case.models]
        common = generator.standard_normal((len(set(trainings)), case.seeds))
        common = common[[sorted(set(trainings)).index(name) for name in trainings]]
        draws = math.sqrt(case.seed_correlation) * common + math.sqrt(1 - case.seed_correlation) * draws
    scales = np.array([0.0 if model.is_reference else model.noise_scale for model in case.models])
    noise: Array = case.noise.seeds * scales[:, None] * draws
    return noise


def _draw_example_noise(case: Case, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    """Return draws of mean 0 and standard deviation 1, normal or exponential."""
    if case.distribution == "skewed":
        return generator.standard_exponential(shape) - 1
    return generator.standard_normal(shape)


def _simulate_right_or_wrong(case: Case, seed_noise: Array, generator: np.random.Generator) -> Array:
    """Return (M, S, N) scores of 0 or 100 whose means over all draws are those of the models.

    Examples differ in difficulty as much as they differ between methods.
    """
    noise, (models, seeds), count = case.noise, seed_noise.shape, case.examples
    latent = seed_noise[:, :, None] + noise.examples * generator.standard_normal((models, seeds, count))
    latent += noise.method * generator.standard_normal((models, 1, count))
    latent += noise.method * generator.standard_normal((1, 1, count))
    total = math.sqrt(noise.seeds**2 + noise.examples**2 + 2 * noise.method**2)
    bounds = np.array([NormalDist().inv_cdf(model.mean / 100) for model in case.models]) * total
    return np.where(latent < bounds[:, None, None], 100.0, 0.0)


# ---- judging ----


def judge_cases(cases: Sequence[Case], judge: Judge, tables: int, workers: int) -> dict[str, list[Judged]]:
    """Judge `tables` of each case in `workers` processes; print the progress to stderr.

    The tables are the same in every run: a generator is keyed by the case's name and the block.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes
    sizes = [min(BLOCK, tables - start) for start in range(0, tables, BLOCK)]
    tasks = [(case, block, size) for block, size in enumerate(sizes) for case in cases]
    judged: dict[str, list[Judged]] = {case.name: [] for case in cases}
    start = last_print = time.perf_counter()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_judge_block, judge, *task) for task in tasks]
        for done, (future, task) in enumerate(zip(futures, tasks, strict=True), 1):
            judged[task[0].name] += future.result()
            now = time.perf_counter()
            if now - last_print > 1:
                minutes_left = (now - start) / done * (len(tasks) - done) / 60
                print(f"\r{done / len(tasks):4.0%}, {minutes_left:.1f} min left  ", end="", file=sys.stderr)
                last_print = now
    minutes = (time.perf_counter() - start) / 60
    print(f"\r{minutes:.1f} min for {tables} tables of {len(cases)} cases", file=sys.stderr)
    return judged


def simulate_block(case: Case, block: int, count: int) -> list[tuple[Array, Array | None]]:
    """Return the scores of `count` tables of one block."""
    generator = np.random.default_rng([zlib.crc32(case.name.encode()), block])
    return [simulate_scores(case, generator) for _ in range(count)]


def _judge_block(judge: Judge, case: Case, block: int, count: int) -> list[Judged]:
    """Simulate and judge the tables of one block."""
    return [judge(case, scores, examples) for scores, examples in simulate_block(case, block, count)]
