"""The claims on a run: its table, what its models wrote, and how long their training took."""

from collections.abc import Iterable, Mapping

from gkd_lab.claims.definitions import CLAIMS, Claim
from gkd_lab.claims.facts import Measurement, extract_measurements
from gkd_lab.claims.judge import ClaimVerdict, ResampleLookup, judge
from gkd_lab.config import Grid
from gkd_lab.config.cell import AnyEvaluation
from gkd_lab.statistics.bootstrap import Array, bootstrap_scores, load_example_statistics
from gkd_lab.statistics.effects import SCORE_TOLERANCE
from gkd_lab.store import Record, Store
from gkd_lab.tables.rows import name_evaluations
from gkd_lab.tables.table import table


def judge_run(
    grid: Grid, store: Store, claims: Iterable[Claim] = tuple(CLAIMS.values())
) -> list[ClaimVerdict]:
    """Verdicts on what is done of a grid."""
    cells = {cell.fingerprint: cell for cell in grid.cells}
    facts = extract_measurements(table(grid, store), cells, measure_step_seconds(grid, store))
    return judge(claims, facts, build_resample_lookup(grid, store))


def measure_step_seconds(grid: Grid, store: Store) -> dict[str, float]:
    """Fingerprint -> seconds of a step, of cells that were trained alone and without a break.

    A pack's time is that of all of its members, so it says nothing of one.
    """
    found = {}
    for cell in grid.cells:
        record = store.get_record(cell)
        facts = record.read_provenance()
        seconds = facts.get("spent", {}).get("seconds")
        alone = len(facts.get("pack", ())) == 1 and not facts.get("resumed_at_step")
        if seconds is not None and alone and record.read_state() == "done":
            found[cell.fingerprint] = float(seconds) / cell.training.steps
    return found


def build_resample_lookup(grid: Grid, store: Store) -> ResampleLookup:
    """Scores of a model on resampled examples, where what it wrote is kept and gives the table's score.

    Models with equal numbers of examples are resampled alike, which is what pairs them.
    """
    judged = _index_evaluations(grid, store)
    kept: dict[tuple[str | None, str | None], Array | None] = {}

    def drawn(fact: Measurement) -> Array | None:
        key = (fact.fingerprint, fact.score_column)
        if key not in kept:
            kept[key] = _resample_scores(fact, judged)
        return kept[key]

    return drawn


def _resample_scores(
    measurement: Measurement, judged: Mapping[tuple[str, str], tuple[Record, AnyEvaluation]]
) -> Array | None:
    if measurement.fingerprint is None or measurement.score_column is None or measurement.value is None:
        return None
    evaluation, metric = measurement.score_column.split("/", 1)
    if (measurement.fingerprint, evaluation) not in judged:
        return None
    found = load_example_statistics(*judged[measurement.fingerprint, evaluation], metric)
    if found is None or len(found) < 2 or abs(found.score - measurement.value) > SCORE_TOLERANCE:
        return None
    scores: Array = bootstrap_scores([found])[0]
    return scores


def _index_evaluations(grid: Grid, store: Store) -> dict[tuple[str, str], tuple[Record, AnyEvaluation]]:
    """(fingerprint, name of the evaluation) -> its record and specification, models held against included."""
    found = {}
    for cell in grid.cells:
        names = name_evaluations(cell.evaluations)
        for fingerprint, record in (
            (cell.fingerprint, store.get_record(cell)),
            (cell.training.start.fingerprint, store.get_artifact(cell.scale, "start", cell.training.start)),
            (
                cell.training.teacher.fingerprint,
                store.get_artifact(cell.scale, "teacher", cell.training.teacher),
            ),
        ):
            for evaluation in cell.evaluations:
                found[fingerprint, names[evaluation.folder]] = (record, evaluation)
    return found
