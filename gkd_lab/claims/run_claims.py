"""The claims on a run: its table, what its models wrote, and how long their training took."""

from collections.abc import Iterable, Mapping

from gkd_lab.claims.definitions import CLAIMS, Claim
from gkd_lab.claims.facts import Fact, of_table
from gkd_lab.claims.judge import Drawn, Finding, judge
from gkd_lab.config import GridOfCells
from gkd_lab.config.cell import AnyEvaluation
from gkd_lab.statistics.bootstrap import Array, bootstrap, recorded_sample
from gkd_lab.statistics.effects import SAME
from gkd_lab.store import Record, Store
from gkd_lab.tables.rows import evaluation_names
from gkd_lab.tables.table import table


def judge_run(
    grid: GridOfCells, store: Store, claims: Iterable[Claim] = tuple(CLAIMS.values())
) -> list[Finding]:
    """Verdicts on what is done of a grid."""
    cells = {cell.fingerprint: cell for cell in grid.cells}
    facts = of_table(table(grid, store), cells, step_seconds(grid, store))
    return judge(claims, facts, resampled_by(grid, store))


def step_seconds(grid: GridOfCells, store: Store) -> dict[str, float]:
    """Fingerprint -> seconds of a step, of cells that were trained alone and without a break.

    A pack's time is that of all of its members, so it says nothing of one.
    """
    found = {}
    for cell in grid.cells:
        record = store.of(cell)
        facts = record.provenance()
        seconds = facts.get("spent", {}).get("seconds")
        alone = len(facts.get("pack", ())) == 1 and not facts.get("resumed_at_step")
        if seconds is not None and alone and record.state() == "done":
            found[cell.fingerprint] = float(seconds) / cell.training.steps
    return found


def resampled_by(grid: GridOfCells, store: Store) -> Drawn:
    """Scores of a model on resampled examples, where what it wrote is kept and gives the table's score.

    Models with equal numbers of examples are resampled alike, which is what pairs them.
    """
    judged = _judged(grid, store)
    kept: dict[tuple[str | None, str | None], Array | None] = {}

    def drawn(fact: Fact) -> Array | None:
        key = (fact.cell, fact.column)
        if key not in kept:
            kept[key] = _resampled(fact, judged)
        return kept[key]

    return drawn


def _resampled(fact: Fact, judged: Mapping[tuple[str, str], tuple[Record, AnyEvaluation]]) -> Array | None:
    if fact.cell is None or fact.column is None or fact.value is None:
        return None
    evaluation, metric = fact.column.split("/", 1)
    if (fact.cell, evaluation) not in judged:
        return None
    found = recorded_sample(*judged[fact.cell, evaluation], metric)
    if found is None or len(found) < 2 or abs(found.value - fact.value) > SAME:
        return None
    scores: Array = bootstrap([found])[0]
    return scores


def _judged(grid: GridOfCells, store: Store) -> dict[tuple[str, str], tuple[Record, AnyEvaluation]]:
    """(fingerprint, name of the evaluation) -> its record and specification, models held against included."""
    found = {}
    for cell in grid.cells:
        names = evaluation_names(cell.evaluations)
        for fingerprint, record in (
            (cell.fingerprint, store.of(cell)),
            (cell.training.start.fingerprint, store.artifact(cell.scale, "start", cell.training.start)),
            (cell.training.teacher.fingerprint, store.artifact(cell.scale, "teacher", cell.training.teacher)),
        ):
            for evaluation in cell.evaluations:
                found[fingerprint, names[evaluation.folder]] = (record, evaluation)
    return found
