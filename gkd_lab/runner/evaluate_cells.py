"""Evaluating finished models: decode once for a whole pack, judge each cell, store what was written."""

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.cell import AnyEvaluation, Cell, Evaluation, LmEvalEvaluation, Role
from gkd_lab.evaluation.classify import classify_rows
from gkd_lab.evaluation.decoding import generate_predictions
from gkd_lab.metrics.scored_predictions import score_predictions
from gkd_lab.models.classifiers import parse_classifier_kind
from gkd_lab.models.packing import Pack
from gkd_lab.runner import artifacts
from gkd_lab.runner.dataset import encode_examples, load_split, write_split_report
from gkd_lab.runner.failures import RecordedFailure, record_failures
from gkd_lab.runner.memory import PackCapacity, compute_capacity, measure_free_bytes, run_packs
from gkd_lab.runner.run_options import RunOptions, select_device
from gkd_lab.runner.train_cells import load_trained_pack
from gkd_lab.store import EvaluationRecord, Record
from gkd_lab.store.predictions import DamagedPredictions
from gkd_lab.store.rescore import rescore_evaluation


def evaluate_cells(cells: Sequence[Cell], options: RunOptions) -> None:
    """Every evaluation, and every metric of one, that a trained cell of the pack lacks."""
    trained = [cell for cell in cells if options.store.get_record(cell).read_status().get("state") == "done"]
    for evaluation in _list_distinct_evaluations(trained):
        asked = [cell for cell in trained if evaluation in cell.evaluations]
        _start_tracking(asked, evaluation, options)
        _score_missing_metrics([options.store.get_record(cell) for cell in asked], evaluation, options)
        lacking = [cell for cell in asked if _is_pending(options.store.get_record(cell), evaluation, options)]
        if lacking:
            run_packs(
                lacking,
                partial(_get_evaluation_record, evaluation=evaluation, options=options),
                partial(_limit_evaluation_pack, lacking, options),
                partial(_evaluate_pack, evaluation=evaluation, options=options),
                options,
            )
    for cell in trained:
        for one in cell.evaluations:
            if isinstance(one, LmEvalEvaluation):
                _start_tracking([cell], one, options)
        evaluate_harness_tasks(options.store.get_record(cell), cell.training.start, cell.evaluations, options)


def evaluate_harness_tasks(
    record: Record, model: SftModel, evaluations: Sequence[AnyEvaluation], options: RunOptions
) -> None:
    """Those tasks of lm-eval that a finished record was not asked yet; the caller holds its lock."""
    asked = [one for one in evaluations if isinstance(one, LmEvalEvaluation)]
    lacking = [one for one in asked if _is_pending(record, one, options)]
    if lacking:
        from gkd_lab.runner.lm_eval_runs import run_requested_tasks  # loads lm-eval, which takes seconds

        run_requested_tasks(record, model, lacking, options)
        options.tracker.log_scores(record)


def _start_tracking(cells: Sequence[Cell], evaluation: AnyEvaluation, options: RunOptions) -> None:
    """Open the tracker's run of each cell that is about to be judged."""
    for cell in cells:
        record = options.store.get_record(cell)
        if record.get_evaluation(evaluation).lacks_metrics(evaluation) or _is_pending(
            record, evaluation, options
        ):
            options.tracker.start_run(cell, record)


def _get_evaluation_record(cell: Cell, evaluation: Evaluation, options: RunOptions) -> EvaluationRecord:
    return options.store.get_record(cell).get_evaluation(evaluation)


def _limit_evaluation_pack(cells: Sequence[Cell], options: RunOptions) -> PackCapacity:
    """As in training: one cell where packing is known to fail, else as many as there is memory for."""
    first = cells[0]
    if options.store.get_sft_student(first).read_unpackable_reason():
        return PackCapacity(1)
    if options.pack != "auto" or len(cells) == 1:
        return PackCapacity(len(cells))
    # The members are read one by one and then stacked: each is there twice.
    files = options.store.get_record(first).checkpoint.glob("*.safetensors")
    needed = 2 * sum(file.stat().st_size for file in files)
    free = min(measure_free_bytes(place) for place in {"cpu", select_device()}) // options.workers
    limit = compute_capacity(len(cells), needed, free)
    if limit.reason:
        options.reporter.say(f"{first.task}: evaluation: {limit.reason}")
    return limit


def _evaluate_pack(cells: list[Cell], limit_reason: str, evaluation: Evaluation, options: RunOptions) -> None:
    pack, tokenizer = load_trained_pack(cells, options)
    records = [options.store.get_record(cell) for cell in cells]
    _decode_and_score(pack, tokenizer, cells[0].training.start, evaluation, records, options)


def evaluate_reference(
    role: Role,
    model: SftModel,
    record: Record,
    cells: Sequence[Cell],
    options: RunOptions,
) -> None:
    """The same evaluations for a teacher or a starting student."""
    with artifacts.hold_record_lock(record, role, options):
        for evaluation in _list_distinct_evaluations(cells):
            _score_missing_metrics([record], evaluation, options)
            if _is_pending(record, evaluation, options):
                part = record.get_evaluation(evaluation)
                with suppress(RecordedFailure), record_failures([part], options.outputs):
                    loaded = artifacts.load_artifact(record, model)
                    pack = Pack.build_single(loaded.model)
                    _decode_and_score(pack, loaded.tokenizer, model, evaluation, [record], options, role)
        asked = dict.fromkeys(evaluation for cell in cells for evaluation in cell.evaluations)
        evaluate_harness_tasks(record, model, tuple(asked), options)


def _score_missing_metrics(records: Sequence[Record], evaluation: Evaluation, options: RunOptions) -> None:
    """Metrics that were asked for after the predictions were written are computed from these."""
    for record in records:
        part = record.get_evaluation(evaluation)
        if part.lacks_metrics(evaluation):
            with suppress(RecordedFailure), record_failures([], options.outputs):
                try:
                    rescore_evaluation(part, evaluation.metrics)
                    options.tracker.log_scores(record)
                except DamagedPredictions:
                    part.status_file.unlink()  # some of what was written is lost: it is decoded again


def _list_distinct_evaluations(cells: Sequence[Cell]) -> list[Evaluation]:
    found = (e for cell in cells for e in cell.evaluations if isinstance(e, Evaluation))
    return list(dict.fromkeys(found))


def _is_pending(record: Record, evaluation: AnyEvaluation, options: RunOptions) -> bool:
    part = record.get_evaluation(evaluation)
    if options.retry_failed:
        part.clear_failure()
    return not part.read_status()


def _decode_and_score(
    pack: Pack,
    tokenizer: Any,
    model: SftModel,
    evaluation: Evaluation,
    records: Sequence[Record],
    options: RunOptions,
    role: str = "",
) -> None:
    split = load_split(model.task, model.data, evaluation.split, options.cache_folder)
    pack.model.to(select_device())
    found = split.take_first(evaluation.examples)
    encoded, cut = encode_examples(model, tokenizer, found)
    count = role or ("1 cell" if len(records) == 1 else f"{len(records)} cells")
    name = f"{model.task}: {count}, {evaluation.name} on {len(found)} rows"
    began, done = time.monotonic(), 0
    with options.reporter.phase(name, len(found)) as advance:

        def progress(more: int) -> None:
            nonlocal done
            done += more
            advance(done)

        if parse_classifier_kind(model.family):
            predictions = classify_rows(pack, tokenizer, found, encoded, progress)
        else:
            predictions = generate_predictions(pack, tokenizer, found, encoded, evaluation, progress)
    seconds = (time.monotonic() - began) / len(records)
    for record, written in zip(records, predictions, strict=True):
        scores, lines = score_predictions(evaluation.metrics, written)
        write_split_report(record.get_evaluation(evaluation).folder, evaluation.split, cut)
        record.get_evaluation(evaluation).write_results(
            evaluation, lines, scores, rows=len(lines), seconds_of_decoding=round(seconds, 3)
        )
        options.tracker.log_scores(record)
