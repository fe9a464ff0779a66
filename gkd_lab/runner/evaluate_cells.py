"""Evaluating finished models: decode once for a whole pack, judge each cell, store what was written."""

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from gkd_lab.config.cell import AnyEvaluation, Cell, Evaluation, HarnessEvaluation, Role, SftModel
from gkd_lab.evaluation.classify import classify
from gkd_lab.evaluation.decoding import predict
from gkd_lab.metrics.scored_predictions import judge
from gkd_lab.models.classifiers import classified
from gkd_lab.models.packing import Pack
from gkd_lab.runner import artifacts
from gkd_lab.runner.dataset import examples, report_cut, rows
from gkd_lab.runner.failures import PartFailed, kept_by
from gkd_lab.runner.memory import Limit, fitting, free_bytes, in_packs
from gkd_lab.runner.run_options import RunOptions, device
from gkd_lab.runner.train_cells import load_pack
from gkd_lab.store import EvaluationRecord, Record
from gkd_lab.store.pack_cache import kept_reason
from gkd_lab.store.predictions import DamagedPredictions
from gkd_lab.store.rescore import rejudge


def evaluate_cells(cells: Sequence[Cell], options: RunOptions) -> None:
    """Every evaluation, and every metric of one, that a trained cell of the pack lacks."""
    trained = [cell for cell in cells if options.store.of(cell).status().get("state") == "done"]
    for evaluation in _distinct(trained):
        asked = [cell for cell in trained if evaluation in cell.evaluations]
        _follow(asked, evaluation, options)
        _add_metrics([options.store.of(cell) for cell in asked], evaluation, options)
        lacking = [cell for cell in asked if _is_open(options.store.of(cell), evaluation, options)]
        if lacking:
            in_packs(
                lacking,
                partial(_part, evaluation=evaluation, options=options),
                partial(_limit, lacking, options),
                partial(_evaluate_cells, evaluation=evaluation, options=options),
                options,
            )
    for cell in trained:
        for one in cell.evaluations:
            if isinstance(one, HarnessEvaluation):
                _follow([cell], one, options)
        with_harness(options.store.of(cell), cell.training.start, cell.evaluations, options)


def with_harness(
    record: Record, model: SftModel, evaluations: Sequence[AnyEvaluation], options: RunOptions
) -> None:
    """Those tasks of lm-eval that a finished record was not asked yet; the caller holds its lock."""
    asked = [one for one in evaluations if isinstance(one, HarnessEvaluation)]
    lacking = [one for one in asked if _is_open(record, one, options)]
    if lacking:
        from gkd_lab.runner.lm_eval_runs import ask_all  # loads lm-eval, which takes seconds

        ask_all(record, model, lacking, options)
        options.tracker.judged(record)


def _follow(cells: Sequence[Cell], evaluation: AnyEvaluation, options: RunOptions) -> None:
    """Open the tracker's run of each cell that is about to be judged."""
    for cell in cells:
        record = options.store.of(cell)
        if record.evaluation(evaluation).lacks(evaluation) or _is_open(record, evaluation, options):
            options.tracker.start(cell, record)


def _part(cell: Cell, evaluation: Evaluation, options: RunOptions) -> EvaluationRecord:
    return options.store.of(cell).evaluation(evaluation)


def _limit(cells: Sequence[Cell], options: RunOptions) -> Limit:
    """As in training: one cell where packing is known to fail, else as many as there is memory for."""
    first = cells[0]
    if kept_reason(options.store.artifact(first.scale, "start", first.training.start)):
        return Limit(1)
    if options.pack != "auto" or len(cells) == 1:
        return Limit(len(cells))
    # The members are read one by one and then stacked: each is there twice.
    files = options.store.of(first).checkpoint.glob("*.safetensors")
    needed = 2 * sum(file.stat().st_size for file in files)
    free = min(free_bytes(place) for place in {"cpu", device()}) // options.workers
    limit = fitting(len(cells), needed, free)
    if limit.why:
        options.reporter.say(f"{first.task}: evaluation: {limit.why}")
    return limit


def _evaluate_cells(cells: list[Cell], why: str, evaluation: Evaluation, options: RunOptions) -> None:
    pack, tokenizer = load_pack(cells, options)
    records = [options.store.of(cell) for cell in cells]
    _evaluate(pack, tokenizer, cells[0].training.start, evaluation, records, options)


def evaluate_reference(
    role: Role,
    model: SftModel,
    record: Record,
    cells: Sequence[Cell],
    options: RunOptions,
) -> None:
    """The same evaluations for a teacher or a starting student."""
    with artifacts.waited_for(record, role, options):
        for evaluation in _distinct(cells):
            _add_metrics([record], evaluation, options)
            if _is_open(record, evaluation, options):
                part = record.evaluation(evaluation)
                with suppress(PartFailed), kept_by([part], options.outputs):
                    loaded = artifacts.load(record, model)
                    pack = Pack.alone(loaded.model)
                    _evaluate(pack, loaded.tokenizer, model, evaluation, [record], options, role)
        asked = dict.fromkeys(evaluation for cell in cells for evaluation in cell.evaluations)
        with_harness(record, model, tuple(asked), options)


def _add_metrics(records: Sequence[Record], evaluation: Evaluation, options: RunOptions) -> None:
    """Metrics that were asked for after the predictions were written are computed from these."""
    for record in records:
        part = record.evaluation(evaluation)
        if part.lacks(evaluation):
            with suppress(PartFailed), kept_by([], options.outputs):
                try:
                    rejudge(part, evaluation.metrics)
                    options.tracker.judged(record)
                except DamagedPredictions:
                    part.status_file.unlink()  # some of what was written is lost: it is decoded again


def _distinct(cells: Sequence[Cell]) -> list[Evaluation]:
    found = (e for cell in cells for e in cell.evaluations if isinstance(e, Evaluation))
    return list(dict.fromkeys(found))


def _is_open(record: Record, evaluation: AnyEvaluation, options: RunOptions) -> bool:
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
    split = rows(model.task, model.data, evaluation.split, options.cache)
    pack.model.to(device())
    found = split.first(evaluation.examples)
    encoded, cut = examples(model, tokenizer, found)
    count = who or ("1 cell" if len(records) == 1 else f"{len(records)} cells")
    name = f"{model.task}: {count}, {evaluation.name} on {len(found)} rows"
    began, done = time.monotonic(), 0
    with options.reporter.phase(name, len(found)) as advance:

        def progress(more: int) -> None:
            nonlocal done
            done += more
            advance(done)

        if classified(model.family):
            predictions = classify(pack, tokenizer, found, encoded, progress)
        else:
            predictions = predict(pack, tokenizer, found, encoded, evaluation, progress)
    seconds = (time.monotonic() - began) / len(records)
    for record, written in zip(records, predictions, strict=True):
        scores, lines = judge(evaluation.metrics, written)
        report_cut(record.evaluation(evaluation).folder, evaluation.split, cut)
        record.evaluation(evaluation).write(
            evaluation, lines, scores, rows=len(lines), seconds_of_decoding=round(seconds, 3)
        )
        options.tracker.judged(record)
