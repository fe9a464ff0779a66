"""Evaluate finished models: decode once for a whole pack, score each cell, store predictions and scores."""

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
from gkd_lab.runner.dataset import encode_examples, load_split, take_first_rows, write_split_report
from gkd_lab.runner.failures import RecordedFailure, record_failures
from gkd_lab.runner.memory import PackCapacity, measure_free_bytes, run_packs
from gkd_lab.runner.pack_capacity import attempt_pack, keep_capacity, keep_shortage
from gkd_lab.runner.run_options import RunOptions, select_device
from gkd_lab.runner.train_cells import load_trained_pack
from gkd_lab.store import EvaluationRecord, Record
from gkd_lab.store.predictions import DamagedPredictions
from gkd_lab.store.rescore import rescore_evaluation


def evaluate_cells(cells: Sequence[Cell], options: RunOptions) -> None:
    """Run every missing evaluation, and compute every missing metric, of the cells whose training is done.

    Results and failures are stored in the cells' records, whose locks the caller holds.
    """
    trained_cells = [
        cell for cell in cells if options.store.get_record(cell).read_status().get("state") == "done"
    ]
    for evaluation in _list_distinct_evaluations(trained_cells):
        requesting_cells = [cell for cell in trained_cells if evaluation in cell.evaluations]
        records = [options.store.get_record(cell) for cell in requesting_cells]
        _start_tracking(requesting_cells, evaluation, options)
        _score_missing_metrics(records, evaluation, options)
        pending_cells = [
            cell
            for cell, record in zip(requesting_cells, records, strict=True)
            if _clear_failure_and_check_missing(record, evaluation, options)
        ]
        if pending_cells:
            run_packs(
                pending_cells,
                partial(_get_evaluation_record, evaluation=evaluation, options=options),
                partial(_estimate_evaluation_capacity, pending_cells, options),
                partial(_evaluate_pack, evaluation=evaluation, options=options),
                options,
                partial(keep_shortage, pending_cells[0], "evaluation", options),
            )
    for cell in trained_cells:
        for lm_eval_evaluation in cell.evaluations:
            if isinstance(lm_eval_evaluation, LmEvalEvaluation):
                _start_tracking([cell], lm_eval_evaluation, options)
        evaluate_harness_tasks(options.store.get_record(cell), cell.training.start, cell.evaluations, options)


def evaluate_reference(
    role: Role,
    model: SftModel,
    record: Record,
    cells: Sequence[Cell],
    options: RunOptions,
) -> None:
    """Run the cells' missing evaluations on `record`, their teacher or SFT student, under its lock.

    Metrics that finished evaluations lack are computed too. Results and failures are stored in the record.
    """
    with artifacts.hold_record_lock(record, role, options):
        for evaluation in _list_distinct_evaluations(cells):
            _score_missing_metrics([record], evaluation, options)
            if _clear_failure_and_check_missing(record, evaluation, options):
                evaluation_record = record.get_evaluation(evaluation)
                with suppress(RecordedFailure), record_failures([evaluation_record], options.outputs):
                    loaded = artifacts.load_artifact(record, model)
                    pack = Pack.build_single(loaded.model)
                    _decode_and_score(pack, loaded.tokenizer, model, evaluation, [record], options, role)
        evaluations = dict.fromkeys(evaluation for cell in cells for evaluation in cell.evaluations)
        evaluate_harness_tasks(record, model, tuple(evaluations), options)


def evaluate_harness_tasks(
    record: Record, model: SftModel, evaluations: Sequence[AnyEvaluation], options: RunOptions
) -> None:
    """Run those of `evaluations` that are lm-eval's and have no result yet, on a finished record.

    The caller holds the record's lock. With `--retry-failed`, a failed evaluation is run again.
    """
    pending = [
        evaluation
        for evaluation in evaluations
        if isinstance(evaluation, LmEvalEvaluation)
        and _clear_failure_and_check_missing(record, evaluation, options)
    ]
    if pending:
        from gkd_lab.runner.lm_eval_runs import run_requested_tasks  # loads lm-eval, which takes seconds

        run_requested_tasks(record, model, pending, options)
        options.tracker.log_scores(record)


def _list_distinct_evaluations(cells: Sequence[Cell]) -> list[Evaluation]:
    """Return the evaluations of all cells except lm-eval's, each once, in order of first appearance."""
    evaluations = (evaluation for cell in cells for evaluation in cell.evaluations)
    return list(dict.fromkeys(e for e in evaluations if isinstance(e, Evaluation)))


def _start_tracking(cells: Sequence[Cell], evaluation: AnyEvaluation, options: RunOptions) -> None:
    """Open the tracker run of cells whose evaluation must run or lacks a metric; clear failures to retry.

    With `--retry-failed`, a failed evaluation loses its status first.
    """
    for cell in cells:
        record = options.store.get_record(cell)
        lacks_metrics = record.get_evaluation(evaluation).lacks_metrics(evaluation)
        if lacks_metrics or _clear_failure_and_check_missing(record, evaluation, options):
            options.tracker.start_run(cell, record)


def _clear_failure_and_check_missing(record: Record, evaluation: AnyEvaluation, options: RunOptions) -> bool:
    """Delete a failed status if `--retry-failed` is set, then return whether the evaluation has no status."""
    evaluation_record = record.get_evaluation(evaluation)
    if options.retry_failed:
        evaluation_record.clear_failure()
    return not evaluation_record.read_status()


def _score_missing_metrics(records: Sequence[Record], evaluation: Evaluation, options: RunOptions) -> None:
    """Compute the metrics that finished evaluations lack, from stored predictions, and store the scores.

    An evaluation with damaged predictions loses its status instead, so that the model decodes again. Other
    errors are ignored, except those of the machine.
    """
    for record in records:
        evaluation_record = record.get_evaluation(evaluation)
        if evaluation_record.lacks_metrics(evaluation):
            with suppress(RecordedFailure), record_failures([], options.outputs):
                try:
                    rescore_evaluation(evaluation_record, evaluation.metrics)
                    options.tracker.log_scores(record)
                except DamagedPredictions:
                    evaluation_record.clear_status()  # so that the model decodes again


def _get_evaluation_record(cell: Cell, evaluation: Evaluation, options: RunOptions) -> EvaluationRecord:
    """Return the record of a cell's evaluation, whether or not it exists yet."""
    return options.store.get_record(cell).get_evaluation(evaluation)


def _estimate_evaluation_capacity(cells: Sequence[Cell], options: RunOptions) -> PackCapacity:
    """Return the PackCapacity: 1 if unpackable, what memory allows if `pack` is auto, else all the cells.

    It is 1 where the students are known to be unpackable. The estimate is by the size of the weight files.
    """
    if options.store.get_sft_student(cells[0]).read_unpackable_reason():
        return PackCapacity(1)
    return keep_capacity(cells, "evaluation", options, partial(_measure_evaluation_bytes, cells, options))


def _measure_evaluation_bytes(cells: Sequence[Cell], options: RunOptions) -> tuple[int, int]:
    """Return the bytes that one cell needs while its pack is built, and those that are available."""
    # The members are loaded one by one and then stacked, so that each is in memory twice.
    weight_files = options.store.get_record(cells[0]).checkpoint.glob("*.safetensors")
    bytes_per_cell = 2 * sum(file.stat().st_size for file in weight_files)
    return bytes_per_cell, min(
        measure_free_bytes(device) // options.count_sharing_workers(device)
        for device in {"cpu", select_device()}
    )


def _evaluate_pack(cells: list[Cell], limit_reason: str, evaluation: Evaluation, options: RunOptions) -> None:
    """Load the cells' trained models as one pack, evaluate it, store each cell's predictions and scores.

    limit_reason: not used; `run_packs` passes it.
    """
    records = [options.store.get_record(cell) for cell in cells]
    with attempt_pack(cells, "evaluation", options):
        pack, tokenizer = load_trained_pack(cells, options, is_best=evaluation.checkpoint == "best")
        _decode_and_score(pack, tokenizer, cells[0].training.start, evaluation, records, options)


def _decode_and_score(
    pack: Pack,
    tokenizer: Any,
    model: SftModel,
    evaluation: Evaluation,
    records: Sequence[Record],
    options: RunOptions,
    role: str = "",
) -> None:
    """Predict on the evaluation's rows by all members at once; store predictions and scores in each record.

    model: the spec of the pack's members. records: one for each member. role: name of a reference model.
    """
    rows = take_first_rows(
        load_split(model.task, model.data, evaluation.split, options.cache_folder), evaluation.examples
    )
    pack.model.to(select_device())
    examples, report = encode_examples(model, tokenizer, rows)
    members = role or ("1 cell" if len(records) == 1 else f"{len(records)} cells")
    start, predicted_rows = time.monotonic(), 0
    phase = f"{model.task}: {members}, {evaluation.name} on {len(rows)} row{'' if len(rows) == 1 else 's'}"
    folders = [record.folder for record in records]
    with options.reporter.phase(phase, len(rows), folders=folders, work=evaluation.name) as update_progress:

        def add_finished_rows(count: int) -> None:
            """Add `count` rows to the number of finished rows, and update the progress."""
            nonlocal predicted_rows
            predicted_rows += count
            update_progress(predicted_rows)

        if parse_classifier_kind(model.family):
            predictions = classify_rows(pack, tokenizer, rows, examples, add_finished_rows)
        else:
            predictions = generate_predictions(pack, tokenizer, rows, examples, evaluation, add_finished_rows)
    seconds = round((time.monotonic() - start) / len(records), 3)
    for record, member_predictions in zip(records, predictions, strict=True):
        scores, prediction_rows = score_predictions(evaluation.metrics, member_predictions)
        evaluation_record = record.get_evaluation(evaluation)
        write_split_report(evaluation_record.folder, evaluation.split, report)
        evaluation_record.write_results(
            evaluation, prediction_rows, scores, rows=len(prediction_rows), seconds_of_decoding=seconds
        )
        options.tracker.log_scores(record)
