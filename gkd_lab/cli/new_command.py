"""The command `new`: write an experiment for the user's data and pair, after looking at both.

What is not given as an option is asked for in a terminal. The file is loaded as `plan` loads it before it is
written, so that `gkd-lab plan FILE` accepts it.
"""

import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from gkd_lab import experiments
from gkd_lab.cli.data_preview import DataPreview, preview_data
from gkd_lab.cli.experiment_draft import Request, find_family, write_draft
from gkd_lab.cli.options import OutputsOption, check_output_file, check_outputs_folder, load_grid
from gkd_lab.cli.pair_preview import ModelPreview, preview_model
from gkd_lab.config import ConfigError
from gkd_lab.config.errors import build_unknown_name_error, join_faults
from gkd_lab.config.experiment import parse_override
from gkd_lab.store.files import write_bytes
from gkd_lab.tasks import TASKS
from gkd_lab.tasks.task_proposal import TaskProposal, list_columns, propose_task

Answer = TypeVar("Answer")
_PLACE = "a folder or owner/name"
_MAX_EXAMPLE = 60
"""Characters that are shown of a value."""


def write_new_experiment(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="File to write; default: named by the data.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FOLDER|OWNER/NAME", help="Your rows: jsonl, parquet or the hub.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Configuration of a hub data set, or a subfolder.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Default: the one that reads your rows.", autocompletion=lambda: list(TASKS)),
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the input.")] = None,
    target: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the output.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|OWNER/NAME", help="Default, with --data alone: made on your rows."),
    ] = None,
    student: Annotated[str | None, typer.Option(metavar="FOLDER|OWNER/NAME", help="As --teacher.")] = None,
    family: Annotated[
        Literal["decoder-only", "encoder-decoder"] | None,
        typer.Option(help="Kind of the models, where it cannot be seen."),
    ] = None,
    sft_steps: Annotated[
        int | None,
        typer.Option("--sft-steps", min=0, help="Fine-tune both on your rows first, for so many steps."),
    ] = None,
    lmbda: Annotated[
        str, typer.Option(metavar="V1,V2", help="Shares of the student's own text.")
    ] = "0,0.5,1",
    beta: Annotated[str, typer.Option(metavar="V1,V2", help="Divergences JSD(beta).")] = "0,0.5,1",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of each cell.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    outputs: OutputsOption = Path("outputs"),
) -> None:
    """Write a commented experiment for your data and your pair, after looking at both.

    What is missing is asked for in a terminal. Without a pair, models are made on your rows.
    """
    check_outputs_folder(outputs)
    if file is not None:
        _check_file(file, force)
    if task is not None and task not in TASKS:
        raise build_unknown_name_error("task", task, TASKS)
    shares, betas = parse_numbers("lmbda", lmbda), parse_numbers("beta", beta)
    is_asking = sys.stdin.isatty() and None in (data, teacher, student)
    options, previews = _Options(data, task, prompt, target, teacher, student, is_asking), _Previews(config)
    _check_options(options, previews)
    notes: list[str] = []  # shown at once where questions follow, else with the result
    say = _print_note if is_asking else notes.append
    preview = _ask_for("Data, " + _PLACE, data, previews.data)
    say(f"{preview.source}: {preview.describe_splits()}")
    models = _choose_pair(options, previews)
    scale = "nano" if models[0] is None else "smol"
    proposal = _choose_task(preview, scale, options)
    _describe_proposal(preview, proposal, say)
    if sft_steps is None and is_asking and models[0] is not None:
        sft_steps = _ask_for("Fine-tune both on your rows first, steps", None, _parse_count, default="0")
    request = Request(
        data=preview,
        proposal=proposal,
        teacher=models[0],
        student=models[1],
        scale=scale,
        family=family,
        sft_steps=sft_steps or 0,
        lmbda=shares,
        beta=betas,
        seeds=seeds,
        steps=steps,
    )
    _describe_pair(request, say)
    path = file or _choose_file(preview, force, is_asking)
    text = write_draft(request)
    _check_draft(text, path, outputs, say)
    write_bytes(path, text.encode())
    for note in notes:
        _print_note(note)
    print(f"wrote: {path}\nnext:  gkd-lab plan {shlex.quote(str(path))}")


def _choose_file(data: DataPreview, force: bool, is_asking: bool) -> Path:
    """Return the file to write: named by the data, which the user may change. Raises ConfigError."""
    name = f"{Path(data.source).expanduser().resolve().name}.yaml"

    def accept(text: str) -> Path:
        return _check_file(Path(text), force)

    return _ask_for("File", None if is_asking else name, accept, default=name)


def _parse_count(text: str) -> int:
    """Return a number of steps from 0. Raises ConfigError."""
    if not text.isdecimal():
        raise ConfigError(f"{text!r} is not valid: must be a whole number from 0")
    return int(text)


def parse_numbers(name: Literal["lmbda", "beta"], text: str) -> list[Any]:
    """Return the values of `--lmbda 0,0.5,1`. Raises ConfigError unless they are numbers from 0 to 1."""
    values = parse_override(f"--{name}", text)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"--{name} {text}: {value!r} is not valid: must be a number from 0 to 1")
    return values


def _check_file(file: Path, force: bool) -> Path:
    """Return a file that may be written: `.yaml`, and new or with `--force`. Raises ConfigError."""
    if file.suffix not in (".yaml", ".yml"):
        name = file.with_suffix(".yaml")
        raise ConfigError(f"{str(file)!r}: an experiment's file ends in .yaml; write {name}")
    check_output_file(file, "mine.yaml", "FILE")
    if file.exists() and not force:
        raise ConfigError(f"{str(file)!r} is there already; give another name, or --force to overwrite it")
    return file


def _ask_for(
    question: str,
    given: str | None,
    look: Callable[[str], Answer],
    default: str | None = None,
) -> Answer:
    """Return what `look` makes of a given value, or of one asked for until `look` accepts it.

    Raises ConfigError for a given value that it refuses.
    """
    if given is not None:
        return look(given)

    def accept(answer: str) -> Answer:
        try:
            return look(answer.strip())
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from error

    answer: Answer = typer.prompt(
        question, default=default, value_proc=accept, err=True, show_default=bool(default)
    )
    return answer


@dataclass(frozen=True)
class _Options:
    """Options about data, columns and models; None: not given."""

    data: str | None
    task: str | None
    prompt: str | None
    target: str | None
    teacher: str | None
    student: str | None
    is_asking: bool
    """Whether what is not given is asked for in a terminal."""


class _Previews:
    """Functions that return the preview of data, teacher and student; each place is read once."""

    def __init__(self, config: str | None) -> None:
        self.data = cache(partial(preview_data, config=config))
        self.teacher = cache(partial(_preview_given_model, "--teacher"))
        self.student = cache(partial(_preview_given_model, "--student"))


def _check_options(options: _Options, previews: _Previews) -> None:
    """Raise ConfigError with all faults of data, teacher and student, and of options that are missing."""

    def check_rows(place: str) -> None:
        """Read the first rows and, where no question follows, choose the task that parses them."""
        preview = previews.data(place)
        if not options.is_asking:
            _choose_task(preview, "smol" if options.teacher else "nano", options)

    faults = _list_faults(
        [(check_rows, options.data), (previews.teacher, options.teacher), (previews.student, options.student)]
    )
    if not options.is_asking:
        faults += _list_missing_options(options)
    if faults:
        raise join_faults(faults)


def _list_faults(parts: Iterable[tuple[Callable[[str], object], str | None]]) -> list[str]:
    """Return the faults of each place that its function refuses; None: a place that was not given."""
    faults = []
    for look, place in parts:
        if place is not None:
            try:
                look(place)
            except ConfigError as error:
                faults += error.list_faults()
    return faults


def _list_missing_options(options: _Options) -> list[str]:
    """Return a sentence for each option that is missing where there is no terminal to ask in."""
    faults = []
    if options.data is None:
        faults.append("--data is missing, and there is no terminal to ask in; see `gkd-lab new --help`")
    if bool(options.teacher) != bool(options.student):
        missing = "--student" if options.teacher else "--teacher"
        faults.append(f"{missing} is missing: a pair is two models, or none")
    return faults


def _preview_given_model(option: str, place: str) -> ModelPreview | None:
    """Return the preview of a model; None for an empty answer. Raises ConfigError."""
    return preview_model(option, place) if place else None


def _choose_pair(options: _Options, previews: _Previews) -> tuple[ModelPreview | None, ModelPreview | None]:
    """Return the previews of teacher and student; (None, None) without a pair."""
    if options.teacher is None and options.student is None and not options.is_asking:
        return None, None
    question = f"Teacher, {_PLACE} (empty: made on your rows)"
    teacher = _ask_for(question, options.teacher, previews.teacher, default="")
    if teacher is None:
        return None, None
    student = _ask_for(f"Student, {_PLACE}", options.student or None, previews.student)
    assert student is not None, "a student is asked for until one is given"
    return teacher, student


def _choose_task(data: DataPreview, scale: str, options: _Options) -> TaskProposal:
    """Return the task and columns for the rows: as given, else as proposed, which the user may change."""
    task, prompt, target = options.task, options.prompt, options.target
    tasks = {name: item for name, item in TASKS.items() if scale in item.scales or name == task}

    def propose(name: str | None, input_column: str | None, output_column: str | None) -> TaskProposal:
        try:
            return propose_task(data.rows, tasks, task=name, prompt=input_column, target=output_column)
        except ValueError as error:
            raise ConfigError(f"--data: {data.source}: {error}") from error

    proposal = propose(task, prompt, target)
    if not options.is_asking or None not in (task, prompt, target):
        return proposal
    for name, value in list_columns(data.rows).items():
        _print_note(f"  {name}: {_shorten(value)}")

    def accept_task(name: str) -> TaskProposal:
        if name not in tasks:
            raise build_unknown_name_error("task", name, tasks)
        return proposal if name == proposal.task else propose(name, prompt, target)

    chosen = _ask_for("Task", task, accept_task, default=proposal.task)
    input_column = _ask_for("Column of the input", prompt, _check_column(data), default=chosen.prompt)
    output_column = _ask_for("Column of the output", target, _check_column(data), default=chosen.target)
    if (input_column, output_column) == (chosen.prompt, chosen.target):
        return chosen
    return propose(chosen.task, input_column, output_column)


def _check_column(data: DataPreview) -> Callable[[str], str]:
    """Return a function that returns a column's name, or raises ConfigError if the rows have none such."""
    columns = list_columns(data.rows)

    def check(name: str) -> str:
        if name not in columns:
            raise build_unknown_name_error("column", name, columns)
        return name

    return check


def _check_draft(text: str, file: Path, outputs: Path, say: Callable[[str], None]) -> None:
    """Raise ConfigError, as `plan` would, for what keeps the written experiment from running."""
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / file.name
        write_bytes(draft, text.encode())
        try:
            grid = load_grid(str(draft), None, None, outputs, allow_missing_revisions=True)
            experiments.check_models_and_splits(grid)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(draft), str(file))) from error
    if grid.missing_revisions:
        say(f"note: {grid.missing_revisions}")


def _print_note(text: str) -> None:
    """Print a line about data or models to standard error."""
    print(text, file=sys.stderr)


def _describe_proposal(data: DataPreview, proposal: TaskProposal, say: Callable[[str], None]) -> None:
    """Say the chosen task and columns, an example, and what is wrong with rows that it cannot read."""
    row = proposal.rows[0]
    say(f"task {proposal.task}: {proposal.prompt} -> {proposal.target}")
    say(f"  {_shorten(row.prompt)} -> {_shorten(row.target)}")
    unread = len(data.rows) - len(proposal.rows)
    if unread:
        first = f"{unread} of the first {len(data.rows)} rows"
        say(f"note: {first} cannot be read, and a run stops at such a row: {proposal.fault}")


def _describe_pair(request: Request, say: Callable[[str], None]) -> None:
    """Say the facts about the pair. Raises ConfigError if its models do not go together."""
    find_family(request)
    for role, model in (("teacher", request.teacher), ("student", request.student)):
        if model is not None:
            say(f"{role} {model.describe()}" if model.is_user_model else f"{role} {model.place}")
    if request.tokenizer_difference:
        say(f"tokenizers differ: {request.tokenizer_difference}")
        say("  so the cells train on text and on how sure the teacher is of it (ULD), docs/family.md")
    elif request.tokenizer_difference == "":
        say("tokenizers: equal")


def _shorten(value: Any) -> str:
    """Return a value as one line of at most 60 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= _MAX_EXAMPLE else f"{text[: _MAX_EXAMPLE - 3]}..."
