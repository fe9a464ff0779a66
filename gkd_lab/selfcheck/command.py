"""`gkd-lab selfcheck`: load a pair, or make two tiny ones, measure it, print a table; no file stays."""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoConfig, PreTrainedModel

from gkd_lab.config.cell import Architecture, Family, TokenizerSpec
from gkd_lab.config.errors import SpecError
from gkd_lab.models.build import make_model, train_tokenizer
from gkd_lab.models.loading import pretrained
from gkd_lab.models.vocabulary import head_size, shared_vocabulary, tokenizer_of
from gkd_lab.runner.progress import Reporter
from gkd_lab.selfcheck.bench import TEXTS, Bench, Pair
from gkd_lab.selfcheck.checks import BFLOAT16, CHECKS, ERRORS, Finding, failed, stopped

Results = list[tuple[str, str, Finding]]
"""Name, meaning and finding of each check."""

FAMILIES: tuple[Family, ...] = ("decoder-only", "encoder-decoder")
SPREAD = {"decoder-only": 10.0, "encoder-decoder": 3.0}
"""Untrained weights times this: else every next token is about equally likely and no check could fail."""


def selfcheck(teacher: str | None, student: str | None, *, bf16: bool = False) -> bool:
    """Print a table for the named pair, or for two made ones; whether all checks passed.

    Raises SpecError for names that cannot be loaded and models of two families.
    """
    if (teacher is None) != (student is None):
        missing = "--teacher" if teacher is None else "--student"
        raise SpecError(f"{missing} is missing: name both models, or neither to check two made pairs")
    out, reporter = Console(highlight=False), Reporter()
    pairs: Iterator[tuple[str, Pair]]
    if teacher is None or student is None:
        pairs = ((f"{family}, made on the spot", made(family)) for family in FAMILIES)
    else:
        pairs = iter([(f"{student} <- {teacher}", load(teacher, student, reporter))])
    passed = [_report(out, title, pair, measure(pair, reporter, bf16=bf16)) for title, pair in pairs]
    return all(passed)


def load(teacher: str, student: str, reporter: Reporter) -> Pair:
    """Both models in float32 with their tokenizers. Remote code is never run."""
    configs = {option: _config(option, name) for option, name in _named(teacher, student)}
    kinds = {o: "encoder-decoder" if c.is_encoder_decoder else "decoder-only" for o, c in configs.items()}
    if len(set(kinds.values())) > 1:
        raise SpecError(
            f"--student {student!r} is {kinds['--student']} and --teacher {teacher!r} is "
            f"{kinds['--teacher']}: choose two models of one kind"
        )
    models: dict[str, PreTrainedModel] = {}
    with reporter.phase("loading", 2) as advance:
        for option, name in _named(teacher, student):
            models[option] = _model(option, name)
            advance(len(models))
    tokenizer = tokenizer_of(models["--student"])
    if tokenizer is None:
        raise SpecError(f"--student {student!r} has no tokenizer: save it there, `tokenizer.save_pretrained`")
    return Pair(models["--student"], models["--teacher"], tokenizer, tokenizer_of(models["--teacher"]))


def _named(teacher: str, student: str) -> Sequence[tuple[str, str]]:
    return ("--student", student), ("--teacher", teacher)


def _config(option: str, name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _cannot_load(option, name, error) from error


def _model(option: str, name: str) -> PreTrainedModel:
    try:
        return pretrained(name, {"dtype": torch.float32}, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise _cannot_load(option, name, error) from error


def _cannot_load(option: str, name: str, error: Exception) -> SpecError:
    if Path(name).exists():
        return SpecError(f"{option} {name!r} cannot be loaded: {_first_line(error)}")
    return SpecError(
        f"{option} {name!r}: no such folder, and no model of that name can be had from the hub "
        f"({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def made(family: Family) -> Pair:
    """A teacher of three layers and a student of two, with one byte-level tokenizer of 512 entries."""
    tokenizer = train_tokenizer(
        TokenizerSpec(kind="bpe", vocab_size=512), [f"{prompt} {answer}" for prompt, answer in TEXTS]
    )
    models = []
    for seed, (layers, width) in enumerate(((2, 64), (3, 96))):
        shape = Architecture(layers=layers, width=width, heads=4, feed_forward=2 * width)
        model = make_model(family, shape, tokenizer, seed=seed, max_tokens=512, dropout=0.1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1 and "shared" not in name:
                    weight.mul_(SPREAD[family])
        models.append(model)
    return Pair(models[0], models[1], tokenizer, tokenizer)


def measure(pair: Pair, reporter: Reporter, *, bf16: bool = False) -> Results:
    """All findings; none after a vocabulary that is not common, or a trainer that refuses the pair."""
    first = ("tokenizers", "ids mean the same to both", _tokenizers(pair))
    if not first[2].passed:
        return [first]
    checks = (*CHECKS, BFLOAT16) if bf16 else CHECKS
    results = [first]
    with (
        tempfile.TemporaryDirectory() as folder,
        _unheard(),
        reporter.phase("checks", len(checks)) as advance,
    ):
        try:
            bench = Bench(pair, Path(folder))
        except ERRORS as error:
            return [first, ("trainer", "takes the pair", stopped(error))]
        for check in checks:
            results.append((check.name, check.meaning, check(bench)))
            advance(len(results) - 1)
    return results


def _tokenizers(pair: Pair) -> Finding:
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        try:
            shared_vocabulary(pair.student, pair.teacher, pair.tokenizer, pair.teacher_tokenizer)
        except ValueError as error:
            return failed(str(error), "differ")
    notes = [str(one.message) for one in remarks]
    sizes = [head_size(model) for model in (pair.student, pair.teacher)]
    if sizes[0] != sizes[1]:
        notes.append(f"heads of {sizes[0]:,} and {sizes[1]:,} entries: the first {min(sizes):,} are compared")
    shown = "teacher's is unknown" if pair.teacher_tokenizer is None else f"{len(pair.tokenizer):,} entries"
    return Finding(0.0, 0.0, shown, remark="; ".join(notes))


@contextmanager
def _unheard() -> Iterator[None]:
    """The checks report what the trainer would warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _report(out: Console, title: str, pair: Pair, results: Results) -> bool:
    """Print sizes, table and the reasons of what failed; whether all passed."""
    # Words are wrapped for a person; a file or a pipe gets a line for each reason.
    say = partial(out.print, markup=False, soft_wrap=not out.is_terminal)
    sizes = [f"{_parameters(model) / 1e6:,.1f} M" for model in (pair.student, pair.teacher)]
    say(f"{title}\nstudent {sizes[0]}, teacher {sizes[1]} parameters, float32")
    out.print(_table(results))
    wrong = [(name, finding) for name, _, finding in results if not finding.passed]
    for name, finding in wrong:
        say(f"FAIL {name}: {finding.reason}")
    for name, _, finding in results:
        if finding.remark:
            say(f"note {name}: {finding.remark}")
    if len(results) < len(CHECKS):
        out.print("Nothing else was checked.")
    out.print(f"{len(results) - len(wrong)} of {len(results)} checks passed\n")
    return not wrong


def _table(results: Results) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("check", "what holds", "measured"):
        table.add_column(heading, overflow="fold")
    table.add_column("limit", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, meaning, finding in results:
        verdict = "[green]pass[/green]" if finding.passed else "[bold red]FAIL[/bold red]"
        limit = f"{finding.tolerance:.0e}" if finding.tolerance else "0"
        table.add_row(name, meaning, escape(finding.shown), limit, verdict)
    return table


def _parameters(model: PreTrainedModel) -> int:
    """All parameters, frozen ones too."""
    return sum(parameter.numel() for parameter in model.parameters())
