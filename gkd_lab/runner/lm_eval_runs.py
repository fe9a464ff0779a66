"""Run lm-eval tasks on finished records, under their locks, and store the scores as evaluations.

The task name `own` stands for the record's own task: its rows and its decoding, written beside the checkpoint
as an lm-eval YAML that the `lm_eval` command reads too.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.cell import Evaluation, LmEvalEvaluation
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.evaluation_settings import LmEvalSettings, resolve_lm_eval_evaluations
from gkd_lab.config.lm_eval_task import SHIPPED_TASKS_FOLDER, FunctionTag, load_task_yaml
from gkd_lab.evaluation.lm_harness import BATCH_SIZE, BuiltTask, build_task, open_checkpoint, run_task
from gkd_lab.models.build import load_tokenizer
from gkd_lab.models.lora_students import holds_adapter
from gkd_lab.runner import artifacts
from gkd_lab.runner.dataset import build_text_pairs, encode_examples, load_split, take_first_rows
from gkd_lab.runner.failures import RecordedFailure, record_failures
from gkd_lab.runner.run_options import RunOptions, select_device
from gkd_lab.runner.student_files import choose_precision, load_student, read_spec, read_training
from gkd_lab.store import EvaluationRecord, Record
from gkd_lab.store.files import read_json, write_json_lines, write_text
from gkd_lab.training.sampling import collect_end_ids

RECORD_TASK = "own"
TASK_FOLDER = "lm_eval"
"""Folder of a record with its own tasks as lm-eval YAMLs."""


@dataclass(frozen=True)
class HarnessResult:
    """Evaluation of a record by one lm-eval task."""

    evaluation: LmEvalEvaluation
    record: EvaluationRecord


def read_model_spec(record: Record) -> SftModel:
    """Return the model spec in a record's spec.json: an artifact's own, for a cell its SFT student's."""
    spec = read_spec(record)["spec"]
    return SftModel.model_validate(spec.get("start", spec))


def evaluate_record(
    record: Record,
    tasks: Sequence[str],
    options: RunOptions,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = BATCH_SIZE,
    trusted: bool = False,
) -> list[HarnessResult]:
    """Run lm-eval tasks without stored scores on a finished record; return a HarnessResult per task.

    A stored failure is run again. Failures are stored, not raised. Raises ConfigError before anything runs:
    an unknown task, an unusable file, data out of reach.
    """
    model = read_model_spec(record)
    names: list[str] = []
    for task in tasks:
        names += map(str, write_record_tasks(record, options)) if task == RECORD_TASK else [task]
    settings = LmEvalSettings(lm_eval=tuple(names), limit=limit, num_fewshot=num_fewshot)
    results = [
        HarnessResult(evaluation, record.get_evaluation(evaluation))
        for evaluation in resolve_lm_eval_evaluations(settings, trusted=trusted)
    ]
    pending = [result for result in results if result.record.read_state() != "done"]
    built_tasks = [build_task(result.evaluation, trusted=trusted) for result in pending]
    if built_tasks:
        with artifacts.hold_record_lock(record, "cell", options):
            for result in pending:
                result.record.clear_failure()
            run_tasks(record, model, built_tasks, options, batch_size)
    return results


def run_requested_tasks(
    record: Record, model: SftModel, evaluations: Sequence[LmEvalEvaluation], options: RunOptions
) -> None:
    """Run an experiment's lm-eval evaluations on a record; store an error as a failed evaluation.

    That includes a task that cannot be set up. The caller holds the record's lock.
    """
    built_tasks = []
    for evaluation in evaluations:
        try:
            built_tasks.append(build_task(evaluation))
        except ConfigError as error:
            evaluation_record = record.get_evaluation(evaluation)
            evaluation_record.write_spec(evaluation)
            evaluation_record.mark_failed(str(error))
    if built_tasks:
        run_tasks(record, model, built_tasks, options)


def run_tasks(
    record: Record,
    model: SftModel,
    built_tasks: Sequence[BuiltTask],
    options: RunOptions,
    batch_size: int = BATCH_SIZE,
) -> None:
    """Load the record's checkpoint and run lm-eval tasks on it; store scores or the error of each task.

    The caller holds the record's lock.
    """
    evaluation_records = [record.get_evaluation(task.evaluation) for task in built_tasks]
    with suppress(RecordedFailure), record_failures(evaluation_records, options.outputs):
        checkpoint, tokenizer = _load_if_adapter(record, model)
        lm = open_checkpoint(checkpoint, model, select_device(), batch_size, tokenizer)
        for task, evaluation_record in zip(built_tasks, evaluation_records, strict=True):
            with suppress(RecordedFailure), record_failures([evaluation_record], options.outputs):
                _run_and_store_task(lm, task, evaluation_record, options)


def _load_if_adapter(record: Record, model: SftModel) -> tuple[Path | PreTrainedModel, Any]:
    """Return what lm-eval opens: the checkpoint's folder and None, or a LoRA student and its tokenizer."""
    if not holds_adapter(record.checkpoint):
        return record.checkpoint, None
    precision = choose_precision(read_training(record))
    return load_student(record, model, precision), load_tokenizer(record.checkpoint)


def _run_and_store_task(
    lm: Any, task: BuiltTask, evaluation_record: EvaluationRecord, options: RunOptions
) -> None:
    """Run one lm-eval task on a loaded model; write its spec, predictions, scores and status `done`."""
    evaluation = task.evaluation
    evaluation_record.write_spec(evaluation)
    start = time.monotonic()
    task_count = len(task.task_objects["tasks"])
    phase = (
        f"lm-eval {evaluation.name}: {task_count} task{'s' if task_count != 1 else ''}, "
        f"{task.document_count} documents"
    )
    folders = [evaluation_record.folder.parents[1]]
    with options.reporter.phase(
        phase, task.document_count, folders=folders, work=evaluation.name
    ) as update_progress:
        scores, prediction_rows = run_task(lm, task, update_progress)
    evaluation_record.write_results(
        evaluation,
        prediction_rows,
        scores,
        rows=len(prediction_rows),
        lm_eval=evaluation.lm_eval,
        task_hash=task.hash,
        seconds=round(time.monotonic() - start, 3),
    )


def write_record_tasks(record: Record, options: RunOptions) -> list[Path]:
    """Write an lm-eval YAML of the record's own task per stored greedy or beam search; return the YAML paths.

    The rows of each are in a file beside it. Raises ConfigError where the record has no such task.
    """
    model = read_model_spec(record)
    if not (SHIPPED_TASKS_FOLDER / f"{model.task}.yaml").is_file():
        task_names = ", ".join(sorted(path.stem for path in SHIPPED_TASKS_FOLDER.glob("*.yaml")))
        raise ConfigError(f"{model.task} has no lm-eval task; these have: {task_names}")
    evaluations = list(_iterate_search_evaluations(record))
    if not evaluations:
        raise ConfigError(
            f"{record.folder}: no greedy or beam search without a calculator was stored, so there is no "
            f"{RECORD_TASK!r} task; lm-eval cannot repeat sampling, nor beam search with "
            "`length_penalty_form: wu`"
        )
    tokenizer = load_tokenizer(record.checkpoint)
    end_ids = collect_end_ids(load_student(record, model, "fp32"), tokenizer).tolist()
    return [
        _write_record_task(record, model, evaluation, tokenizer, end_ids, options)
        for evaluation in evaluations
    ]


def _iterate_search_evaluations(record: Record) -> Iterator[Evaluation]:
    """Yield the specs of the record's stored evaluations that lm-eval can repeat: greedy or beam search.

    Without a calculator, and with the length penalty of transformers.
    """
    for path in sorted(record.folder.glob("evaluations/*/spec.json")):
        spec = (read_json(path) or {}).get("spec") or {}
        if spec.get("decoding") not in ("greedy", "beam"):
            continue
        evaluation = Evaluation.model_validate(spec)
        if not evaluation.calculator and evaluation.length_penalty_form == "transformers":
            yield evaluation


def _write_record_task(
    record: Record,
    model: SftModel,
    evaluation: Evaluation,
    tokenizer: Any,
    end_ids: list[int],
    options: RunOptions,
) -> Path:
    """Write an evaluation as an lm-eval YAML, and its rows as JSON lines beside it; return the YAML path."""
    rows = take_first_rows(
        load_split(model.task, model.data, evaluation.split, options.cache_folder), evaluation.examples
    )
    _, report = encode_examples(model, tokenizer, rows)
    if report.prompts:
        options.reporter.say(
            f"{model.task}: {report.prompts} prompts of {report.rows} exceed {model.max_input_tokens} "
            "tokens; lm-eval does not cut them as gkd-lab does, so that its score may differ"
        )
    config = load_task_yaml(SHIPPED_TASKS_FOLDER / f"{model.task}.yaml")
    task_file = record.folder / TASK_FOLDER / f"{config['task']}_{evaluation.name}.yaml"
    rows_file = task_file.with_suffix(".jsonl").resolve()
    write_json_lines(
        rows_file,
        [
            {"prompt": prompt, "target": target, "references": list(row.references)}
            for row, (prompt, target) in zip(rows, build_text_pairs(model, rows), strict=True)
        ],
    )
    config["task"] = task_file.stem
    config["dataset_kwargs"] = {"data_files": {"test": str(rows_file)}}
    config["generation_kwargs"] = _build_generation_arguments(model, evaluation, end_ids)
    write_text(task_file, yaml.dump(config, Dumper=_TaskDumper, sort_keys=False, allow_unicode=True))
    options.reporter.say(f"wrote {task_file}, a task for the lm_eval command too")
    return task_file


def _build_generation_arguments(
    model: SftModel, evaluation: Evaluation, end_ids: list[int]
) -> dict[str, Any]:
    """Return lm-eval's `generation_kwargs`, all keys set, so that the checkpoint's own have no effect."""
    arguments: dict[str, Any] = {
        "until": [],
        "do_sample": False,
        "num_beams": evaluation.num_beams or 1,
        "length_penalty": evaluation.length_penalty or 0.0,
        "early_stopping": False,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "eos_token_id": end_ids,
        "max_gen_toks": evaluation.max_output_tokens,
    }
    if model.family == "encoder-decoder":
        # lm-eval adds the source's length to the limit; this is the target's, with its start token.
        arguments["max_length"] = evaluation.max_output_tokens + 1
    return arguments


class _TaskDumper(yaml.SafeDumper):
    """YAML dumper that writes `!function` tags."""


def _represent_function(dumper: yaml.SafeDumper, function: FunctionTag) -> yaml.ScalarNode:
    """Return the YAML node of a function in a task file: its text as a scalar with the tag `!function`."""
    return dumper.represent_scalar("!function", function.text)


_TaskDumper.add_representer(FunctionTag, _represent_function)
