"""lm-eval on finished records: which tasks a cell is asked, run under its lock, stored as evaluations.

`own` stands for the cell's own task: its rows and its way of decoding, written beside the checkpoint as an
lm-eval YAML that the `lm_eval` command reads too.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.cell import Evaluation, LmEvalEvaluation
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.evaluation_settings import LmEvalSettings, resolve_lm_eval_evaluations
from gkd_lab.config.lm_eval_task import SHIPPED_TASKS_FOLDER, FunctionTag, load_task_yaml
from gkd_lab.evaluation.lm_harness import BATCH_SIZE, BuiltTask, build_task, open_checkpoint
from gkd_lab.evaluation.lm_harness import run_task as ask
from gkd_lab.models.build import load_model, load_tokenizer
from gkd_lab.runner import artifacts
from gkd_lab.runner.dataset import build_text_pairs, encode_examples, load_split
from gkd_lab.runner.failures import RecordedFailure, record_failures
from gkd_lab.runner.run_options import RunOptions, select_device
from gkd_lab.store import EvaluationRecord, Record
from gkd_lab.store.files import read_json, write_json_lines, write_text
from gkd_lab.training.sampling import collect_end_ids

RECORD_TASK = "own"
TASK_FOLDER = "lm_eval"
"""Of a record: its own tasks as files."""


@dataclass(frozen=True)
class HarnessResult:
    """One task's verdict on a record."""

    evaluation: LmEvalEvaluation
    record: EvaluationRecord


def read_model_spec(record: Record) -> SftModel:
    """What a record's checkpoint was made from: of a cell, its starting student. Raises SpecError."""
    spec = (read_json(record.folder / "spec.json") or {}).get("spec")
    if spec is None:
        raise ConfigError(f"{record.folder}: spec.json is missing or damaged")
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
    """Each task's evaluation of a finished record; what is stored already is not run again.

    Raises SpecError before anything runs: an unknown task, a file that cannot be used, data out of reach.
    """
    model = read_model_spec(record)
    names = [
        str(one)
        for task in tasks
        for one in (write_record_tasks(record, options) if task == RECORD_TASK else [task])
    ]
    asked = LmEvalSettings(lm_eval=tuple(names), limit=limit, num_fewshot=num_fewshot)
    found = [
        HarnessResult(one, record.get_evaluation(one))
        for one in resolve_lm_eval_evaluations(asked, trusted=trusted)
    ]
    lacking = [one for one in found if one.record.read_state() != "done"]
    built = [build_task(one.evaluation, trusted=trusted) for one in lacking]
    if built:
        with artifacts.hold_record_lock(record, "cell", options):
            for one in lacking:
                one.record.clear_failure()
            run_tasks(record, model, built, options, batch_size)
    return found


def run_requested_tasks(
    record: Record, model: SftModel, evaluations: Sequence[LmEvalEvaluation], options: RunOptions
) -> None:
    """As part of a run: a task that cannot be set up is a failed evaluation, and the others are asked."""
    built = []
    for evaluation in evaluations:
        part = record.get_evaluation(evaluation)
        try:
            built.append(build_task(evaluation))
        except ConfigError as error:
            part.write_spec(evaluation)
            part.mark_failed(str(error))
    if built:
        run_tasks(record, model, built, options)


def run_tasks(
    record: Record,
    model: SftModel,
    built: Sequence[BuiltTask],
    options: RunOptions,
    batch_size: int = BATCH_SIZE,
) -> None:
    """Ask a checkpoint some tasks; the caller holds its lock. Failures are kept in the evaluations."""
    parts = [record.get_evaluation(one.evaluation) for one in built]
    with suppress(RecordedFailure), record_failures(parts, options.outputs):
        lm = open_checkpoint(record.checkpoint, model, select_device(), batch_size)
        for one, part in zip(built, parts, strict=True):
            with suppress(RecordedFailure), record_failures([part], options.outputs):
                _run_task(lm, one, part, options)


def _run_task(lm: Any, built: BuiltTask, part: EvaluationRecord, options: RunOptions) -> None:
    evaluation = built.evaluation
    part.write_spec(evaluation)
    began = time.monotonic()
    name = f"lm-eval {evaluation.name}: {len(built.task_objects['tasks'])} tasks, {built.document_count} documents"
    with options.reporter.phase(name.replace(": 1 tasks", ": 1 task"), built.document_count) as advance:
        scores, lines = ask(lm, built, advance)
    part.write_results(
        evaluation,
        lines,
        scores,
        rows=len(lines),
        lm_eval=evaluation.lm_eval,
        task_hash=built.hash,
        seconds=round(time.monotonic() - began, 3),
    )


def write_record_tasks(record: Record, options: RunOptions) -> list[Path]:
    """The record's own task as lm-eval YAMLs, one for each greedy or beam search that it was judged by.

    Each has its rows beside it. Raises SpecError where there is none.
    """
    model = read_model_spec(record)
    shipped = SHIPPED_TASKS_FOLDER / f"{model.task}.yaml"
    if not shipped.is_file():
        raise ConfigError(f"{model.task} has no lm-eval task; these have: {', '.join(_list_shipped_tasks())}")
    stored = list(_iterate_search_evaluations(record))
    if not stored:
        raise ConfigError(
            f"{record.folder}: no greedy or beam search without a calculator was stored, so there is no "
            f"{RECORD_TASK!r} task; sampling cannot be repeated by lm-eval"
        )
    return [_write_record_task(record, model, evaluation, options) for evaluation in stored]


def _list_shipped_tasks() -> list[str]:
    return sorted(path.stem for path in SHIPPED_TASKS_FOLDER.glob("*.yaml"))


def _iterate_search_evaluations(record: Record) -> Iterator[Evaluation]:
    for path in sorted(record.folder.glob("evaluations/*/spec.json")):
        spec = (read_json(path) or {}).get("spec") or {}
        if spec.get("decoding") in ("greedy", "beam") and not spec.get("calculator"):
            yield Evaluation.model_validate(spec)


def _write_record_task(record: Record, model: SftModel, evaluation: Evaluation, options: RunOptions) -> Path:
    found = load_split(model.task, model.data, evaluation.split, options.cache_folder)[: evaluation.examples]
    tokenizer = load_tokenizer(record.checkpoint)
    _, cut = encode_examples(model, tokenizer, found)
    if cut.prompts:
        options.reporter.say(
            f"{model.task}: {cut.prompts} prompts of {cut.rows} exceed {model.max_input_tokens} tokens; "
            "lm-eval does not cut them as we do, so that its number may differ"
        )
    config = load_task_yaml(SHIPPED_TASKS_FOLDER / f"{model.task}.yaml")
    place = record.folder / TASK_FOLDER / f"{config['task']}_{evaluation.name}.yaml"
    data = place.with_suffix(".jsonl").resolve()
    lines = [
        {"prompt": prompt, "target": target, "references": list(row.references)}
        for row, (prompt, target) in zip(found, build_text_pairs(model, found), strict=True)
    ]
    write_json_lines(data, lines)
    config["task"] = place.stem
    config["dataset_kwargs"] = {"data_files": {"test": str(data)}}
    config["generation_kwargs"] = _build_generation_arguments(record, model, evaluation, tokenizer)
    write_text(place, yaml.dump(config, Dumper=_TaskDumper, sort_keys=False, allow_unicode=True))
    options.reporter.say(f"wrote {place}, a task for the lm_eval command too")
    return place


def _build_generation_arguments(
    record: Record, model: SftModel, evaluation: Evaluation, tokenizer: Any
) -> dict[str, Any]:
    """Every choice stated, so that nothing of the checkpoint's own configuration fills in."""
    loaded = load_model(record.checkpoint, model.family)
    limit = evaluation.max_output_tokens
    chosen: dict[str, Any] = {
        "until": [],
        "do_sample": False,
        "num_beams": evaluation.num_beams or 1,
        "length_penalty": evaluation.length_penalty or 0.0,
        "early_stopping": False,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "eos_token_id": collect_end_ids(loaded, tokenizer).tolist(),
        "max_gen_toks": limit,
    }
    if model.family == "encoder-decoder":
        # lm-eval adds the source's length to the limit; this is the target's, with the token it starts from.
        chosen["max_length"] = limit + 1
    return chosen


class _TaskDumper(yaml.SafeDumper):
    """Writes `!function` tags back."""


def _represent_function(dumper: yaml.SafeDumper, function: FunctionTag) -> yaml.ScalarNode:
    return dumper.represent_scalar("!function", function.text)


_TaskDumper.add_representer(FunctionTag, _represent_function)
