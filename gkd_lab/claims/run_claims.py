"""Judge claims on a run: its table, its stored predictions and its training times."""

from collections.abc import Iterable, Mapping

from gkd_lab.claims.definitions import CLAIMS, Claim
from gkd_lab.claims.judge import ResampleLookup, judge
from gkd_lab.claims.measurements import Measurement, extract_measurements
from gkd_lab.claims.verdicts import ClaimVerdict
from gkd_lab.config import Grid
from gkd_lab.config.cell import AnyEvaluation
from gkd_lab.statistics.bootstrap import bootstrap_scores
from gkd_lab.store import Record, Store
from gkd_lab.tables.example_statistics import SCORE_TOLERANCE, Array, load_example_statistics
from gkd_lab.tables.results import measure_step_seconds, name_evaluations
from gkd_lab.tables.table import build_wide_table


def judge_run(
    grid: Grid, store: Store, claims: Iterable[Claim] = tuple(CLAIMS.values())
) -> list[ClaimVerdict]:
    """Judge claims (default: all) on a run's finished cells; one verdict per claim, in order."""
    cells = {cell.fingerprint: cell for cell in grid.cells}
    frame = build_wide_table(grid, store)
    measurements = extract_measurements(frame, cells, measure_step_seconds(grid, store))
    return judge(claims, measurements, build_resample_lookup(grid, store))


def build_resample_lookup(grid: Grid, store: Store) -> ResampleLookup:
    """Return a cached function: measurement -> (R,) scores on resampled predictions, or None.

    Models with equal numbers of examples get the same resamples, which pairs them. None: the predictions
    are not stored or do not give the table's score.
    """
    evaluations = _index_evaluations(grid, store)
    cache: dict[tuple[str | None, str | None], Array | None] = {}

    def resample(measurement: Measurement) -> Array | None:
        """Return a measurement's (R,) resampled scores, computed once per model and column."""
        key = (measurement.fingerprint, measurement.score_column)
        if key not in cache:
            cache[key] = _resample_scores(measurement, evaluations)
        return cache[key]

    return resample


def _resample_scores(
    measurement: Measurement, evaluations: Mapping[tuple[str, str], tuple[Record, AnyEvaluation]]
) -> Array | None:
    """Return (R,) bootstrap scores; None if predictions are missing or give another score."""
    if measurement.fingerprint is None or measurement.score_column is None or measurement.value is None:
        return None
    evaluation, metric = measurement.score_column.split("/", 1)
    if (measurement.fingerprint, evaluation) not in evaluations:
        return None
    statistics = load_example_statistics(*evaluations[measurement.fingerprint, evaluation], metric)
    if statistics is None or len(statistics) < 2:
        return None
    if abs(statistics.score - measurement.value) > SCORE_TOLERANCE:
        return None
    scores: Array = bootstrap_scores([statistics])[0]
    return scores


def _index_evaluations(grid: Grid, store: Store) -> dict[tuple[str, str], tuple[Record, AnyEvaluation]]:
    """Map (fingerprint, evaluation's column name) to (record, evaluation); starts, teachers too."""
    index = {}
    for cell in grid.cells:
        names = name_evaluations(cell.evaluations)
        start, teacher = cell.training.start, cell.training.teacher
        for fingerprint, record in (
            (cell.fingerprint, store.get_record(cell)),
            (start.fingerprint, store.get_artifact(cell.scale, "start", start)),
            (teacher.fingerprint, store.get_artifact(cell.scale, "teacher", teacher)),
        ):
            for evaluation in cell.evaluations:
                index[fingerprint, names[evaluation.folder]] = (record, evaluation)
    return index
