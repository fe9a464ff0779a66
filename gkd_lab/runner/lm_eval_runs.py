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

from gkd_lab.config.cell import Evaluation, HarnessEvaluation, SftModel
from gkd_lab.config.errors import SpecError
from gkd_lab.config.evaluation_settings import harness_evaluations
from gkd_lab.config.lm_eval_task import SHIPPED, Function, load_yaml
from gkd_lab.config.settings import HarnessSettings
from gkd_lab.evaluation.lm_harness import BATCH_SIZE, BuiltTask, build, open_checkpoint
from gkd_lab.evaluation.lm_harness import run as ask
from gkd_lab.models.build import load_model, load_tokenizer
from gkd_lab.runner import artifacts
from gkd_lab.runner.dataset import examples, rows, texts
from gkd_lab.runner.failures import PartFailed, kept_by
from gkd_lab.runner.run_options import RunOptions, device
from gkd_lab.store import EvaluationRecord, Record
from gkd_lab.store.files import read_json, write_lines, write_text
from gkd_lab.training.sampling import end_ids

OWN = "own"
FOLDER = "lm_eval"
"""Of a record: its own tasks as files."""


@dataclass(frozen=True)
class Judged:
    """One task's verdict on a record."""

    evaluation: HarnessEvaluation
    part: EvaluationRecord


def model_of(record: Record) -> SftModel:
    """What a record's checkpoint was made from: of a cell, its starting student. Raises SpecError."""
    spec = (read_json(record.folder / "spec.json") or {}).get("spec")
    if spec is None:
        raise SpecError(f"{record.folder}: spec.json is missing or damaged")
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
) -> list[Judged]:
    """Each task's evaluation of a finished record; what is stored already is not run again.

    Raises SpecError before anything runs: an unknown task, a file that cannot be used, data out of reach.
    """
    model = model_of(record)
    names = [str(one) for task in tasks for one in (own_tasks(record, options) if task == OWN else [task])]
    asked = HarnessSettings(lm_eval=tuple(names), limit=limit, num_fewshot=num_fewshot)
    found = [Judged(one, record.evaluation(one)) for one in harness_evaluations(asked, trusted=trusted)]
    lacking = [one for one in found if one.part.state() != "done"]
    built = [build(one.evaluation, trusted=trusted) for one in lacking]
    if built:
        with artifacts.waited_for(record, "cell", options):
            for one in lacking:
                one.part.forget_failure()
            run_tasks(record, model, built, options, batch_size)
    return found


def ask_all(record: Record, model: SftModel, asked: Sequence[HarnessEvaluation], options: RunOptions) -> None:
    """As part of a run: a task that cannot be set up is a failed evaluation, and the others are asked."""
    built = []
    for evaluation in asked:
        part = record.evaluation(evaluation)
        try:
            built.append(build(evaluation))
        except SpecError as error:
            part.describe(evaluation)
            part.failed(str(error))
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
    parts = [record.evaluation(one.evaluation) for one in built]
    with suppress(PartFailed), kept_by(parts, options.outputs):
        lm = open_checkpoint(record.checkpoint, model, device(), batch_size)
        for one, part in zip(built, parts, strict=True):
            with suppress(PartFailed), kept_by([part], options.outputs):
                _run(lm, one, part, options)


def _run(lm: Any, built: BuiltTask, part: EvaluationRecord, options: RunOptions) -> None:
    evaluation = built.evaluation
    part.describe(evaluation)
    began = time.monotonic()
    name = f"lm-eval {evaluation.name}: {len(built.loaded['tasks'])} tasks, {built.documents} documents"
    with options.reporter.phase(name.replace(": 1 tasks", ": 1 task"), built.documents) as advance:
        scores, lines = ask(lm, built, advance)
    part.write(
        evaluation,
        lines,
        scores,
        rows=len(lines),
        lm_eval=evaluation.lm_eval,
        task_hash=built.hash,
        seconds=round(time.monotonic() - began, 3),
    )


def own_tasks(record: Record, options: RunOptions) -> list[Path]:
    """The record's own task as lm-eval YAMLs, one for each greedy or beam search that it was judged by.

    Each has its rows beside it. Raises SpecError where there is none.
    """
    model = model_of(record)
    shipped = SHIPPED / f"{model.task}.yaml"
    if not shipped.is_file():
        raise SpecError(f"{model.task} has no lm-eval task; these have: {', '.join(_shipped())}")
    stored = list(_searches(record))
    if not stored:
        raise SpecError(
            f"{record.folder}: no greedy or beam search without a calculator was stored, so there is no "
            f"{OWN!r} task; sampling cannot be repeated by lm-eval"
        )
    return [_write_own(record, model, evaluation, options) for evaluation in stored]


def _shipped() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def _searches(record: Record) -> Iterator[Evaluation]:
    for path in sorted(record.folder.glob("evaluations/*/spec.json")):
        spec = (read_json(path) or {}).get("spec") or {}
        if spec.get("decoding") in ("greedy", "beam") and not spec.get("calculator"):
            yield Evaluation.model_validate(spec)


def _write_own(record: Record, model: SftModel, evaluation: Evaluation, options: RunOptions) -> Path:
    found = rows(model.task, model.data, evaluation.split, options.cache)[: evaluation.examples]
    tokenizer = load_tokenizer(record.checkpoint)
    _, cut = examples(model, tokenizer, found)
    if cut.prompts:
        options.reporter.say(
            f"{model.task}: {cut.prompts} prompts of {cut.rows} exceed {model.max_input_tokens} tokens; "
            "lm-eval does not cut them as we do, so that its number may differ"
        )
    config = load_yaml(SHIPPED / f"{model.task}.yaml")
    place = record.folder / FOLDER / f"{config['task']}_{evaluation.name}.yaml"
    data = place.with_suffix(".jsonl").resolve()
    lines = [
        {"prompt": prompt, "target": target, "references": list(row.references)}
        for row, (prompt, target) in zip(found, texts(model, found), strict=True)
    ]
    write_lines(data, lines)
    config["task"] = place.stem
    config["dataset_kwargs"] = {"data_files": {"test": str(data)}}
    config["generation_kwargs"] = _generation(record, model, evaluation, tokenizer)
    write_text(place, yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
    options.reporter.say(f"wrote {place}, a task for the lm_eval command too")
    return place


def _generation(record: Record, model: SftModel, evaluation: Evaluation, tokenizer: Any) -> dict[str, Any]:
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
        "eos_token_id": end_ids(loaded, tokenizer).tolist(),
        "max_gen_toks": limit,
    }
    if model.family == "encoder-decoder":
        # lm-eval adds the source's length to the limit; this is the target's, with the token it starts from.
        chosen["max_length"] = limit + 1
    return chosen


class _Dumper(yaml.SafeDumper):
    """Writes `!function` tags back."""


def _tag(dumper: yaml.SafeDumper, function: Function) -> yaml.ScalarNode:
    return dumper.represent_scalar("!function", function.text)


_Dumper.add_representer(Function, _tag)
