"""Write an experiment file for a user's data and pair: each line with the reason for its value."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from gkd_lab.cli.data_preview import DataPreview
from gkd_lab.cli.pair_preview import ModelPreview, compare_tokenizers, count_tokens
from gkd_lab.config import ConfigError
from gkd_lab.config.artifact_specs import Family
from gkd_lab.config.yaml_files import parse_yaml
from gkd_lab.store.bfloat16 import has_bfloat16_instructions, has_gpu
from gkd_lab.tasks import TASKS
from gkd_lab.tasks.task_proposal import TaskProposal

MAX_TEST_ROWS = 500
_STEPS = {"nano": 300, "smol": 1_000}
_BATCH_SIZE = 16
_LENGTH_SHARE = 0.99
"""Share of the first rows whose texts must fit without being cut."""
_LENGTH_UNIT = 16
_LARGEST_LENGTHS = (1_024, 512)
"""Of prompts and targets: longer ones cost more than a first experiment should."""
_COMMENT_COLUMN = 40
_LARGE_MODEL = 1_000_000_000


@dataclass(frozen=True)
class Request:
    """Settings of the experiment to write: data, task, pair and grid."""

    data: DataPreview
    proposal: TaskProposal
    teacher: ModelPreview | None
    """None: models made on the data, at scale nano."""
    student: ModelPreview | None
    scale: str
    family: Family | None
    """Stated family, for models of which it is not known."""
    sft_steps: int
    lmbda: Sequence[float]
    beta: Sequence[float]
    seeds: int
    steps: int | None

    @property
    def tokenizer_difference(self) -> str | None:
        """How the tokenizers of the pair differ; "": not at all; None: not known, or no pair."""
        if self.teacher is None or self.student is None:
            return None
        return compare_tokenizers(self.teacher, self.student)


@dataclass(frozen=True)
class _Line:
    """A line of the file."""

    text: str
    comment: str = ""


def write_draft(request: Request) -> str:
    """Return the YAML text of the experiment. Raises ConfigError for a pair that does not go together."""
    lines = [
        *_list_description_lines(request),
        *_list_task_lines(request),
        *_list_model_lines(request),
        *_list_length_lines(request),
        *_list_training_lines(request),
        *_list_evaluation_lines(request),
        *_list_grid_lines(request),
    ]
    width = min(_COMMENT_COLUMN, max(len(line.text) for line in lines if line.comment))
    return "".join(
        f"{line.text.ljust(width)}  # {line.comment}\n" if line.comment else f"{line.text}\n"
        for line in lines
    )


def format_value(value: Any) -> str:
    """Return a value as YAML 1.2 on one line, which reads back as it is."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {format_value(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(format_value, value)) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        is_plain = parse_yaml(f"{{key: {value}}}") == {"key": value}
    except yaml.YAMLError:
        is_plain = False
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _state(name: str, value: Any, comment: str) -> _Line:
    """Return the line `name: value  # comment`."""
    return _Line(f"{name}: {format_value(value)}", comment)


def _list_description_lines(request: Request) -> Iterator[_Line]:
    """Yield the description, which the user rewrites."""
    pair = (
        f"{request.teacher.place} into {request.student.place}"
        if request.teacher and request.student
        else "a teacher into a student, both made on the rows,"
    )
    data = request.data.source
    yield _Line("# Made by `gkd-lab new` after a look at the data and the pair; every value may be changed.")
    yield _Line("description: >-")
    yield _Line(f"  Distil {' '.join(pair.split())} on {' '.join(data.split())}.")
    if request.tokenizer_difference:
        yield _Line(
            "  Question: does it help, beside the text, to see how sure a teacher of another tokenizer is of"
        )
        yield _Line("  it (ULD)? Hypothesis: the teacher's own text teaches more than that of the data.")
    else:
        yield _Line(
            "  Question: which lmbda and which divergence are best? Hypothesis: text that the student"
        )
        yield _Line("  writes itself (lmbda 1) teaches more than fixed text (lmbda 0).")


def _list_task_lines(request: Request) -> Iterator[_Line]:
    """Yield scale, task, data, columns and metrics."""
    proposal, data = request.proposal, request.data
    models = "models that are there already" if request.teacher else "small models, made on your rows"
    yield _state("scale", request.scale, models)
    reason = "any pairs of texts" if proposal.task == "text" else "its parser reads your first rows"
    yield _state("task", proposal.task, reason)
    yield _Line("data:", data.describe_splits())
    yield _state("  source", data.source, "relative to the folder in which gkd-lab is called")
    defaults = TASKS[proposal.task].get_defaults(request.scale, data.source)
    if data.config is not None or defaults["data"].get("config") is not None:
        comment = "part of the data set" if data.config else "no part of it is chosen"
        yield _state("  config", data.config, comment)
    if proposal.columns is not None:
        columns = proposal.columns.model_dump(exclude_none=True)
        yield _state("  columns", columns, "names that differ from the task's")
    test_rows = data.row_counts.get("test")
    if test_rows is None or test_rows > MAX_TEST_ROWS:
        yield _state("  test", MAX_TEST_ROWS, "first rows that are scored; more narrow the intervals")
    metrics = proposal.metrics or TASKS[proposal.task].metrics
    yield _state("metrics", list(metrics), "the first one is shown first")


def find_family(request: Request) -> Family | None:
    """Return the family of the pair; None without one. ConfigError: two families, or none known."""
    models = [model for model in (request.teacher, request.student) if model is not None]
    families = {model.family for model in models if model.family is not None}
    if len(families) > 1:
        pair = ", ".join(f"{model.place} is {model.family}" for model in models)
        raise ConfigError(f"{pair}: they do not go together; choose a pair of one kind")
    if request.family is not None and families and families != {request.family}:
        raise ConfigError(f"--family {request.family}: the models are {families.pop()}; leave it out")
    if models and not families and request.family is None and any(model.is_user_model for model in models):
        places = " and ".join(model.place for model in models)
        raise ConfigError(
            f"{places}: their family is not known, because their configuration is not here and the hub does "
            "not answer; add --family decoder-only or --family encoder-decoder"
        )
    return families.pop() if families else request.family


def _list_model_lines(request: Request) -> Iterator[_Line]:
    """Yield family, teacher, student and precision."""
    family = find_family(request)
    if request.teacher is None or request.student is None:
        yield _state("teacher", "xl", "of this scale; or your own, a folder or owner/name")
        yield _state("student", "small", "xl, large, base, small, or your own")
        return
    if family is not None:
        yield _state("family", family, "kind of both models")
    difference = request.tokenizer_difference
    tokenizers = {None: "tokenizers not compared", "": "one tokenizer"}.get(difference, "other tokenizer")
    for role, model in (("teacher", request.teacher), ("student", request.student)):
        value: Any = model.place
        comment = model.describe().partition(": ")[2] if model.is_user_model else "a model of the scale"
        if request.sft_steps and model.is_user_model:
            value = {"pretrained": model.place, "sft": {"steps": request.sft_steps}}
            comment += "; fine-tuned on your rows first"
        yield _state(role, value, f"{comment}; {tokenizers}" if role == "student" else comment)
    yield _choose_precision()


def _choose_precision() -> _Line:
    """Return the line of the precision for this machine."""
    if has_gpu():
        return _state("precision", "bf16", "a GPU was found; autocast over fp32 weights")
    if has_bfloat16_instructions():
        return _state("precision", "bf16", "this CPU multiplies in bf16; autocast over fp32 weights")
    return _state("precision", "fp32", "no GPU was found here; bf16 on one")


def _list_length_lines(request: Request) -> Iterator[_Line]:
    """Yield the lengths in tokens, by the first rows and the student's tokenizer."""
    models = [model for model in (request.student, request.teacher) if model is not None]
    reader = next((model for model in models if model.tokenizer is not None), None)
    unit = "tokens" if reader is not None else "tokens, if a token has 3 characters"
    limits = [m.files.max_positions for m in models if m.files is not None and m.files.max_positions]
    lengths = [
        count_tokens(reader, [getattr(row, side) for row in request.proposal.rows])
        for side in ("prompt", "target")
    ]
    chosen = [
        min(_choose_length(counts), largest)
        for counts, largest in zip(lengths, _LARGEST_LENGTHS, strict=True)
    ]
    if limits:
        chosen = _fit_positions(chosen, min(limits), is_joined=find_family(request) == "decoder-only")
    for name, value, counts in zip(("input", "output"), chosen, lengths, strict=True):
        fitting = sum(count <= value for count in counts)
        comment = f"{fitting} of the first {len(counts)} rows fit; the longest has {max(counts)} {unit}"
        yield _state(f"max_{name}_tokens", value, comment)


def _choose_length(counts: Sequence[int]) -> int:
    """Return a multiple of 16 that holds 99 % of the texts."""
    longest = sorted(counts)[max(0, int(len(counts) * _LENGTH_SHARE + 0.999) - 1)]
    return -(-longest // _LENGTH_UNIT) * _LENGTH_UNIT


def _fit_positions(lengths: Sequence[int], limit: int, *, is_joined: bool) -> list[int]:
    """Return (prompt, target) lengths that a model has positions for; is_joined: for their sum."""
    prompt, target = lengths
    if not is_joined:
        return [min(prompt, limit), min(target, limit)]
    target = min(target, max(1, limit // 2))
    return [min(prompt, limit - target), target]


def _list_training_lines(request: Request) -> Iterator[_Line]:
    """Yield steps, batch size and learning rate."""
    steps, rows = request.steps or _STEPS[request.scale], request.data.count_train_rows()
    batch_size, note = _BATCH_SIZE, ""
    if rows is not None and rows < _BATCH_SIZE:
        batch_size = max(1, 2 ** (rows.bit_length() - 1))
        note = f"; at most the {_format_count(rows, 'row')} to train on"
    passes = "" if rows is None else f"; {_format_passes(steps * batch_size / rows)} over the rows"
    yield _state("steps", steps, f"optimizer steps of each cell{passes}")
    yield _state("batch_size", batch_size, f"sequences per step{note}")
    if request.student is not None and request.student.is_user_model:
        is_large = (request.student.parameters or 0) >= _LARGE_MODEL
        rate = 1e-5 if is_large else 1e-4
        yield _Line(
            f"learning_rate: {'1.0e-5' if rate == 1e-5 else '1.0e-4'}",
            "usual for a student of 1 B weights and more" if is_large else "usual for a student below 1 B",
        )


def _format_passes(passes: float) -> str:
    """Return `0.25 passes`, `9.6 passes` or `1,200 passes`: two digits, or all before the point."""
    return f"{passes:.2g} passes" if passes < 10 else f"{passes:,.0f} passes"


def _format_count(count: int, noun: str) -> str:
    """Return `1 row` or `9 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _list_evaluation_lines(request: Request) -> Iterator[_Line]:
    """Yield the evaluations: greedy decoding of the test rows, or of held-out ones."""
    split = "test" if "test" in request.data.row_counts else "validation"
    note = "of the test rows" if split == "test" else _describe_validation(request.data)
    yield _Line("evaluations:", f"scores of cells, start and teacher, {note}")
    yield _Line(f"  - {{decoding: greedy, split: {split}}}", "also sample (temperature, samples), beam")


def _describe_validation(data: DataPreview) -> str:
    """Return `of validation rows, ...`, with the number of rows that are held out of train for it."""
    all_rows, train_rows = data.row_counts.get("train"), data.count_train_rows()
    if all_rows is None or train_rows is None or all_rows == train_rows:
        return "of validation rows, as there are no test rows"
    return f"of the {_format_count(all_rows - train_rows, 'last row')} of train, as there are no test rows"


def _list_grid_lines(request: Request) -> Iterator[_Line]:
    """Yield the axes; for two tokenizers those of text and of universal logit distillation."""
    seeds = list(range(request.seeds))
    seed_note = "one seed shows the way; 3 to 5 give intervals" if len(seeds) == 1 else "intervals over seeds"
    if request.tokenizer_difference:
        yield _Line("lmbda: 0", "fixed text alone, as the pair has two tokenizers")
        yield _Line("grid:", f"{4 * len(seeds)} cells: every combination")
        yield _Line("  source: [data, teacher]", "text of the data, or of the teacher (SeqKD)")
        yield _Line("  objectives:", request.tokenizer_difference)
        yield _Line("    - [{type: cross_entropy}]", "the text alone")
        yield _Line("    - [{type: cross_entropy}, {type: uld}]", "and how sure the teacher is of it (ULD)")
    else:
        count = len(request.lmbda) * len(request.beta) * len(seeds)
        yield _Line("grid:", f"{count} cells: every combination")
        yield _state("  lmbda", list(request.lmbda), "share of text that the student writes itself")
        yield _state("  beta", list(request.beta), "JSD(beta): 0 forward KL, 1 reverse KL")
    yield _state("  seed", seeds, seed_note)
