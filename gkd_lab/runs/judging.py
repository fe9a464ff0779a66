"""Evaluating finished models: decode once for a whole pack, judge each cell, store what was written."""

import time
from collections.abc import Sequence
from typing import Any

from gkd_lab.evaluation.decoding import predict
from gkd_lab.metrics.judge import judge
from gkd_lab.models.packing import Pack
from gkd_lab.records import Record
from gkd_lab.runs import artifacts
from gkd_lab.runs.cells import load_pack
from gkd_lab.runs.options import RunOptions
from gkd_lab.runs.rows import examples, rows
from gkd_lab.spec.cell import Cell, Evaluation, SftModel


def evaluate_cells(cells: Sequence[Cell], options: RunOptions) -> None:
    """Every evaluation that a trained cell of the pack lacks."""
    for evaluation in _distinct(cells):
        lacking = [
            cell
            for cell in cells
            if evaluation in cell.evaluations
            and options.store.of(cell).status().get("state") == "done"
            and _is_open(options.store.of(cell), evaluation, options)
        ]
        if lacking:
            pack, tokenizer = load_pack(lacking, options)
            records = [options.store.of(cell) for cell in lacking]
            start = lacking[0].training.start
            _evaluate(pack, tokenizer, start, evaluation, records, options)


def evaluate_reference(
    role: artifacts.Role, model: SftModel, record: Record, cells: Sequence[Cell], options: RunOptions
) -> None:
    """The same evaluations for a teacher or a starting student."""
    open_ones = [e for e in _distinct(cells) if _is_open(record, e, options)]
    if open_ones:
        with record.lock():
            loaded = artifacts.load(record, model)
            for evaluation in open_ones:
                pack = Pack.alone(loaded.model)
                _evaluate(pack, loaded.tokenizer, model, evaluation, [record], options, role)


def _distinct(cells: Sequence[Cell]) -> list[Evaluation]:
    return list(dict.fromkeys(e for cell in cells for e in cell.evaluations))


def _is_open(record: Record, evaluation: Evaluation, options: RunOptions) -> bool:
    part = record.evaluation(evaluation)
    if options.retry_failed:
        part.forget_failure()
    return not part.status()


def _evaluate(
    pack: Pack,
    tokenizer: Any,
    model: SftModel,
    evaluation: Evaluation,
    records: Sequence[Record],
    options: RunOptions,
    who: str = "",
) -> None:
    found = rows(model.task, model.data, evaluation.split, options.cache)[: evaluation.examples]
    encoded, _ = examples(model, tokenizer, found)
    count = who or ("1 cell" if len(records) == 1 else f"{len(records)} cells")
    name = f"{model.task}: {count}, {evaluation.name} on {len(found)} rows"
    began, done = time.monotonic(), 0
    with options.reporter.phase(name, len(found)) as advance:

        def progress(more: int) -> None:
            nonlocal done
            done += more
            advance(done)

        predictions = predict(pack, tokenizer, found, encoded, evaluation, progress)
    seconds = (time.monotonic() - began) / len(records)
    for record, written in zip(records, predictions, strict=True):
        scores, lines = judge(evaluation.metrics, written)
        record.evaluation(evaluation).write(
            evaluation, lines, scores, seconds_of_decoding=round(seconds, 3)
        )
