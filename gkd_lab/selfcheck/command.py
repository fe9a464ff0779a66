"""`gkd-lab selfcheck`: load a pair of models, or make two tiny pairs, run the checks and print a table."""

import tempfile
import warnings
from collections.abc import Iterator
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

from gkd_lab.config.artifact_specs import Architecture, Family, TokenizerSpec
from gkd_lab.config.errors import ConfigError
from gkd_lab.models.build import make_model, train_tokenizer
from gkd_lab.models.loading import load_auto_model
from gkd_lab.models.vocabulary import get_head_size, get_shared_vocabulary_size, load_model_tokenizer
from gkd_lab.runner.progress import Reporter
from gkd_lab.selfcheck.bench import PROMPTS_AND_ANSWERS, ModelPair, PairBench
from gkd_lab.selfcheck.checks import BFLOAT16_CHECK, CHECKS
from gkd_lab.selfcheck.invariance import (
    PAIR_ERRORS,
    InvarianceResult,
    create_error_result,
    create_failed_result,
)

CheckResults = list[tuple[str, str, InvarianceResult]]
"""Name, meaning and result of each check."""

MADE_FAMILIES: tuple[Family, ...] = ("decoder-only", "encoder-decoder")
WEIGHT_SCALES = {"decoder-only": 10.0, "encoder-decoder": 3.0}
"""Factors on untrained weights: without them all tokens are about equally likely and no check could fail."""


def run_selfcheck(teacher: str | None, student: str | None, *, bf16: bool = False) -> bool:
    """Check the named pair, or two made ones, print the tables; return whether all checks passed.

    Raises ConfigError for a single name, names that cannot be loaded and models of two families.
    """
    if (teacher is None) != (student is None):
        missing = "--teacher" if teacher is None else "--student"
        raise ConfigError(f"{missing} is missing: name both models, or neither to check two made pairs")
    out, reporter = Console(highlight=False), Reporter()
    pairs: Iterator[tuple[str, ModelPair]]
    if teacher is None or student is None:
        pairs = ((f"{family}, made on the spot", make_pair(family)) for family in MADE_FAMILIES)
    else:
        pairs = iter([(f"{student} <- {teacher}", load_pair(teacher, student, reporter))])
    passed = [_print_report(out, title, pair, run_checks(pair, reporter, bf16=bf16)) for title, pair in pairs]
    return all(passed)


def load_pair(teacher: str, student: str, reporter: Reporter) -> ModelPair:
    """Load both models in float32 with their tokenizers; ConfigError if one fails or their families differ.

    No remote code is run. ConfigError too for a student without a tokenizer; a teacher's may be None.
    """
    names = {"--student": student, "--teacher": teacher}
    configs = {option: _load_config(option, name) for option, name in names.items()}
    kinds = {o: "encoder-decoder" if c.is_encoder_decoder else "decoder-only" for o, c in configs.items()}
    if len(set(kinds.values())) > 1:
        raise ConfigError(
            f"--student {student!r} is {kinds['--student']} and --teacher {teacher!r} is "
            f"{kinds['--teacher']}: choose two models of one kind"
        )
    models: dict[str, PreTrainedModel] = {}
    with reporter.phase("loading", 2) as advance:
        for option, name in names.items():
            models[option] = _load_model(option, name)
            advance(len(models))
    tokenizer = load_model_tokenizer(models["--student"])
    if tokenizer is None:
        raise ConfigError(
            f"--student {student!r} has no tokenizer: save it there, `tokenizer.save_pretrained`"
        )
    return ModelPair(
        models["--student"], models["--teacher"], tokenizer, load_model_tokenizer(models["--teacher"])
    )


def _load_config(option: str, name: str) -> Any:
    """Return the model configuration of `name`; ConfigError, which names CLI option `option`, if it fails."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _build_load_error(option, name, error) from error


def _load_model(option: str, name: str) -> PreTrainedModel:
    """Return the model `name` in float32; ConfigError, which names CLI option `option`, if it fails."""
    try:
        return load_auto_model(name, {"dtype": torch.float32}, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise _build_load_error(option, name, error) from error


def _build_load_error(option: str, name: str, error: Exception) -> ConfigError:
    """Return (not raise) the ConfigError for a model that cannot be loaded from a folder or the hub."""
    if Path(name).exists():
        return ConfigError(f"{option} {name!r} cannot be loaded: {_get_first_line(error)}")
    return ConfigError(
        f"{option} {name!r}: no such folder, and no model of that name can be loaded from the hub "
        f"({_get_first_line(error)})"
    )


def _get_first_line(error: Exception) -> str:
    """Return the first line of an error's message without its final dot, or its type's name if empty."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def make_pair(family: Family) -> ModelPair:
    """Make an untrained 2-layer student and 3-layer teacher with one byte-level tokenizer of 512 entries.

    Weights are scaled up, so that tokens differ in probability.
    """
    tokenizer = train_tokenizer(
        TokenizerSpec(kind="bpe", vocab_size=512),
        [f"{prompt} {answer}" for prompt, answer in PROMPTS_AND_ANSWERS],
    )
    models = []
    for seed, (layers, width) in enumerate(((2, 64), (3, 96))):
        shape = Architecture(layers=layers, width=width, heads=4, feed_forward=2 * width)
        model = make_model(family, shape, tokenizer, seed=seed, max_tokens=512, dropout=0.1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1 and "shared" not in name:
                    weight.mul_(WEIGHT_SCALES[family])
        models.append(model)
    return ModelPair(models[0], models[1], tokenizer, tokenizer)


def run_checks(pair: ModelPair, reporter: Reporter, *, bf16: bool = False) -> CheckResults:
    """Return (name, meaning, result) of each check; only the first if the tokenizers differ.

    If the trainer refuses the pair, that refusal is the second and last. `bf16` adds the check of bfloat16.
    """
    tokenizer_result = _check_tokenizers(pair)
    results = [("tokenizers", "ids mean the same to both", tokenizer_result)]
    if not tokenizer_result.passed:
        return results
    checks = (*CHECKS, BFLOAT16_CHECK) if bf16 else CHECKS
    with tempfile.TemporaryDirectory() as folder, _silence_warnings():
        try:
            bench = PairBench(pair, Path(folder))
        except PAIR_ERRORS as error:
            return [*results, ("trainer", "takes the pair", create_error_result(error))]
        with reporter.phase("checks", len(results) + len(checks), done=len(results)) as advance:
            for check in checks:
                results.append((check.name, check.meaning, check(bench)))
                advance(len(results))
    return results


def _check_tokenizers(pair: ModelPair) -> InvarianceResult:
    """Return a pass with the comparison's warnings as its note, or a failed result if token ids differ."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            get_shared_vocabulary_size(pair.student, pair.teacher, pair.tokenizer, pair.teacher_tokenizer)
        except ValueError as error:
            return create_failed_result(str(error), "differ")
    notes = [str(warning.message) for warning in caught]
    sizes = [get_head_size(model) for model in (pair.student, pair.teacher)]
    if sizes[0] != sizes[1]:
        notes.append(f"heads of {sizes[0]:,} and {sizes[1]:,} entries: the first {min(sizes):,} are compared")
    is_unknown = pair.teacher_tokenizer is None
    measurement = "teacher's is unknown" if is_unknown else f"{len(pair.tokenizer):,} entries"
    return InvarianceResult(0.0, 0.0, measurement, note="; ".join(notes))


@contextmanager
def _silence_warnings() -> Iterator[None]:
    """Ignore all Python warnings within the block: the checks report the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _print_report(out: Console, title: str, pair: ModelPair, results: CheckResults) -> bool:
    """Print sizes, table, reasons of failures and notes; return whether all checks passed."""
    # Words are wrapped for a person; a file or a pipe gets a line for each reason.
    say = partial(out.print, markup=False, soft_wrap=not out.is_terminal)
    sizes = [f"{_count_parameters(model) / 1e6:,.1f} M" for model in (pair.student, pair.teacher)]
    say(f"{title}\nstudent {sizes[0]}, teacher {sizes[1]} parameters, float32")
    out.print(_build_table(results))
    failures = [(name, result) for name, _, result in results if not result.passed]
    for name, result in failures:
        say(f"FAIL {name}: {result.reason}")
    for name, _, result in results:
        if result.note:
            say(f"note {name}: {result.note}")
    if len(results) < len(CHECKS):
        out.print("Nothing else was checked.")
    out.print(f"{len(results) - len(failures)} of {len(results)} checks passed\n")
    return not failures


def _build_table(results: CheckResults) -> Table:
    """Build the rich table: a row for each check with its meaning, measurement, limit, and pass or FAIL."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("check", "what holds", "measured"):
        table.add_column(heading, overflow="fold")
    table.add_column("limit", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, meaning, result in results:
        verdict = "[green]pass[/green]" if result.passed else "[bold red]FAIL[/bold red]"
        limit = f"{result.tolerance:.0e}" if result.tolerance else "0"
        table.add_row(name, meaning, escape(result.measurement), limit, verdict)
    return table


def _count_parameters(model: PreTrainedModel) -> int:
    """Return the number of all parameters, frozen ones too."""
    return sum(parameter.numel() for parameter in model.parameters())
