"""Find the noise that a plan's power is computed with: of a run, of a table's file, or as stated."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

from gkd_lab import experiments
from gkd_lab.claims.judge import load_example_lookup
from gkd_lab.claims.table_noise import NoiseSource, ScoreNoise, measure_noise
from gkd_lab.claims.table_scores import load_table_scores
from gkd_lab.config import ConfigError, Grid
from gkd_lab.config.experiment import Scale
from gkd_lab.statistics.example_scores import build_example_lookup
from gkd_lab.statistics.noise import FULL_SCORE
from gkd_lab.store import Store
from gkd_lab.tables.load_table import list_committed_tables, read_table_file
from gkd_lab.tables.long_table import build_long_table


def choose_noise(
    grid: Grid,
    outputs: Path,
    table_or_experiment: str | None = None,
    deviation: float | None = None,
    example_deviation: float | None = None,
) -> NoiseSource:
    """Return the noise of a table or experiment, of a stated guess, or else of the grid itself.

    example_deviation: as in `state_noise`, also in place of what a table knows. Raises ConfigError.
    """
    if deviation is not None and table_or_experiment is not None:
        raise ConfigError("--noise and --noise-from both say what the noise is: give one of them")
    if deviation is not None:
        return state_noise(deviation, example_deviation)
    if table_or_experiment is None:
        source = find_grid_noise(grid, outputs)
    else:
        try:
            source = load_noise(table_or_experiment, grid.scale, outputs)
        except ConfigError as error:
            raise ConfigError(f"--noise-from {table_or_experiment}: {error}") from error
    return source if example_deviation is None else _state_example_noise(source, example_deviation)


def state_noise(deviation: float, example_deviation: float | None = None) -> NoiseSource:
    """Return the noise of a stated guess.

    deviation: standard deviation over seeds of a cell's score, in points; cells are independent, so that a
    paired difference has sqrt(2) of it. example_deviation: standard deviation over examples of the difference
    of two models at one example, equal in all seeds, in points. Raises ConfigError unless both are in
    (0, 100].
    """
    _check_points("--noise", deviation)
    source = NoiseSource("a stated guess", stated=ScoreNoise(deviation**2))
    return source if example_deviation is None else _state_example_noise(source, example_deviation)


def _state_example_noise(source: NoiseSource, deviation: float) -> NoiseSource:
    """Return a source with a stated noise of the examples."""
    _check_points("--example-noise", deviation)
    by_evaluation, by_metric = (
        {key: replace(noise, example_variance=deviation**2 / 2) for key, noise in noises.items()}
        for noises in (source.by_evaluation, source.by_metric)
    )
    stated = source.stated and replace(source.stated, example_variance=deviation**2 / 2)
    return NoiseSource(f"{source.text}, that of examples stated", by_evaluation, by_metric, stated)


def _check_points(option: str, value: float) -> None:
    """Raise ConfigError for a standard deviation that no score can have."""
    if not 0 < value <= FULL_SCORE:
        raise ConfigError(f"{option} {value:g}: expected points above 0, at most {FULL_SCORE:g}")


def find_grid_noise(grid: Grid, outputs: Path) -> NoiseSource:
    """Return the noise of what is done of a grid, else of the committed table of its name.

    Raises ConfigError if neither has two seeds of a model.
    """
    for source in _measure_sources(grid, outputs):
        if source.by_metric:
            return source
    tasks = {cell.task for cell in grid.cells}
    raise ConfigError(
        f"the noise of {grid.name} at scale {grid.scale} is not known: no model with two seeds is done below "
        f"{str(outputs)!r}, and no table of it with two is committed; give --noise SD, the standard "
        "deviation in points of a cell's score over seeds, or --noise-from TABLE.parquet or EXP, runs of "
        f"{' and '.join(sorted(tasks))}{_suggest_tables(tasks, grid.scale)}"
    )


def load_noise(name: str, scale: str, outputs: Path) -> NoiseSource:
    """Return the noise of a table's parquet file, or of an experiment as `find_grid_noise`.

    Raises ConfigError for an unknown name, or if there are no two seeds of a model.
    """
    if name.endswith(".parquet"):
        source = measure_table_file(Path(name))
        if not source.by_metric:
            raise ConfigError(
                f"--noise-from {name}: no model has scores of two seeds, so their noise is not known"
            )
        return source
    return find_grid_noise(experiments.load(name, scale=cast(Scale, scale), outputs=outputs), outputs)


def measure_table_file(path: Path) -> NoiseSource:
    """Return the noise of a table's parquet file, and of the examples beside it. Raises ConfigError."""
    lookup, _ = load_example_lookup(path)
    return measure_noise(load_table_scores(read_table_file(path), lookup), str(path))


def _measure_sources(grid: Grid, outputs: Path) -> Iterator[NoiseSource]:
    """Yield the noise of a grid's done cells, then of its committed table, if it is of the grid's scale."""
    store = Store(outputs)
    scores = load_table_scores(build_long_table(grid, store), build_example_lookup(grid, store))
    yield measure_noise(scores, f"the done cells of {grid.name} below {outputs}")
    path = list_committed_tables().get(grid.name)
    if path is not None and set(read_table_file(path)["scale"]) == {grid.scale}:
        yield measure_table_file(path)


def _suggest_tables(tasks: set[str], scale: str) -> str:
    """Return `, such as A or B`, the committed tables of a task at a scale with most seeds; empty if none."""
    counts = {}
    for name, path in list_committed_tables().items():
        table = read_table_file(path)
        if tasks & set(table["task"]) and set(table["scale"]) == {scale}:
            counts[name] = table["seed"].nunique()
    names = sorted(counts, key=lambda name: -counts[name])[:2]
    return f", such as {' or '.join(names)}" if names else ""
