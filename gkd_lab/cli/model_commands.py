"""Commands on models: evaluate, export, selfcheck. torch is loaded once work begins."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gkd_lab.cli.options import CellArgument, OutputsOption
from gkd_lab.config import ConfigError
from gkd_lab.store.output_folders import check_outputs_folder, create_outputs_folder


def evaluate_cell(
    cell: CellArgument,
    tasks: Annotated[
        str,
        typer.Option(metavar="NAME,FILE.yaml", help="Tasks of lm-eval; `own`: the task of the cell."),
    ],
    outputs: OutputsOption = Path("outputs"),
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task; default: all.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Default: as each task defines.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents per batch.")] = 16,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let task files run their Python code.")
    ] = False,
) -> None:
    """Run tasks of lm-eval on a finished cell and print the scores, which `table` shows too."""
    from gkd_lab.config.lm_eval_task import resolve_lm_eval_task
    from gkd_lab.store.lookup import find_record

    check_outputs_folder(outputs)
    record = find_record(cell, outputs)
    names = list(filter(None, (name.strip() for name in tasks.split(","))))
    if not names:
        raise ConfigError(f"--tasks {tasks!r}: expected tasks of lm-eval or YAML files, as NAME,FILE.yaml")
    if record.read_state() != "done":
        raise ConfigError(f"{record.folder}: its training is {record.read_state()}, finish it first")
    for name in names:
        resolve_lm_eval_task(name, trusted=trust_remote_code)
    create_outputs_folder(record.folder)
    from gkd_lab.runner.lm_eval_runs import evaluate_record
    from gkd_lab.runner.progress import silence_libraries
    from gkd_lab.runner.run_options import RunOptions

    silence_libraries()
    evaluations = evaluate_record(
        record,
        names,
        RunOptions(outputs),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        trusted=trust_remote_code,
    )
    failures = [result for result in evaluations if result.record.read_state() == "failed"]
    for result in evaluations:
        if result not in failures:
            for metric, score in result.record.read_scores().items():
                print(f"{result.evaluation.name}/{metric}: {_format_score(score)}")
    for result in failures:
        reason = f"{result.record.read_status()['error']} (see {result.record.status_file})"
        print(f"failed: {result.evaluation.name}: {reason}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


def _format_score(score: dict[str, Any]) -> str:
    """Return a score as `0.1234 [0.1000, 0.1500]`, or without interval; `no number` for null."""
    value = "no number" if score["value"] is None else f"{score['value']:.4f}"
    return f"{value} [{score['low']:.4f}, {score['high']:.4f}]" if "low" in score else value


def export_cell(
    cell: CellArgument,
    output: Annotated[Path, typer.Option("-o", help="New folder to write.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge a LoRA adapter into the weights: a plain model.")
    ] = False,
    best: Annotated[
        bool, typer.Option("--best", help="The checkpoint that scored best on validation rows.")
    ] = False,
    outputs: OutputsOption = Path("outputs"),
) -> None:
    """Write a finished cell's student and tokenizer into a folder for transformers or peft.

    A student with LoRA is written as an adapter that names its base, or with --merged as a plain model.
    """
    from gkd_lab.store.lookup import find_record

    check_outputs_folder(outputs)
    record = find_record(cell, outputs)
    from gkd_lab.runner.progress import silence_libraries
    from gkd_lab.runner.student_files import export_record

    silence_libraries()
    content = export_record(record, output, merged=merged, is_best=best)
    print(f"{output}: {content}")


def check_model_pair(
    teacher: Annotated[
        str | None, typer.Option(help="Folder or hub name. Default: a small random model.")
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="Folder or hub name. Default: a small random model.")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Also compare with bfloat16.")] = False,
) -> None:
    """Check invariances of the losses and of sampling on a pair of models; train nothing.

    No file is written. The status is 1 if a check fails.
    """
    from gkd_lab.runner.progress import silence_libraries
    from gkd_lab.selfcheck.command import run_selfcheck

    silence_libraries()
    if not run_selfcheck(teacher, student, bf16=bf16):
        raise typer.Exit(1)
