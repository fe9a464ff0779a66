"""Propose a task and its columns for rows of unknown form, from the names of the columns and the first rows.

A task is proposed if its own parser reads the rows; `text` takes any pair of texts that no other task fits.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gkd_lab.config.artifact_specs import ColumnNames
from gkd_lab.config.errors import suggest_choices
from gkd_lab.tasks.columns import RawRow
from gkd_lab.tasks.row_format import build_row_parser
from gkd_lab.tasks.task import Row, Task

_ROLE_WORDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "arithmetic": (
        ("question", "problem", "query", "prompt", "input", "exercise"),
        ("answer", "solution", "target", "output", "response", "completion", "result"),
    ),
    "translation": (("en", "eng", "english"), ("de", "deu", "ger", "german", "deutsch")),
    "summarization": (
        ("document", "article", "dialogue", "body", "report", "content", "passage", "story", "text"),
        ("summary", "highlights", "abstract", "tldr", "headline", "title"),
    ),
    "classification": (("text", "sentence", "review"), ("label", "sentiment")),
    "tagging": (("tokens",), ("tags",)),
    "scoring": (("text", "sentence"), ("label", "score")),
}
"""Task -> words of the names that its prompt and its target may have, the likeliest first."""
_BUILT_IN_COLUMNS = {"instruction": ({"inputs", "targets"}, {"question", "answer", "choices"})}
"""Task -> sets of columns, any of which it reads by itself."""
_READS_ANY_TEXT = {"translation", "summarization"}
"""Tasks whose parsers take any texts, so that the names of the columns alone speak for them."""
_PROMPT_WORDS = (
    *("prompt", "question", "problem", "query", "instruction", "input", "inputs", "source", "src"),
    *("document", "article", "dialogue", "context", "text", "sentence", "body"),
)
_TARGET_WORDS = (
    *("target", "targets", "answer", "solution", "completion", "response", "output", "outputs", "tgt"),
    *("summary", "highlights", "label", "reference"),
)
_NO_TEXTS = {"id", "uid", "uuid", "idx", "index", "url", "split", "lang", "language", "subject", "category"}
"""Words of columns that are neither prompt nor target."""
_LANGUAGES = {
    *("en", "de", "fr", "es", "it", "pt", "nl", "pl", "cs", "ru", "uk", "zh", "ja", "ko", "ar", "hi", "tr"),
    *("sv", "da", "fi", "no", "ro", "el", "he", "hu", "vi", "th"),
}
"""Codes by which the columns of translations are named."""
MIN_PARSED = 0.9
"""Share of the first rows that a task must read to be proposed."""
_SHORT_WORDS = 6


@dataclass(frozen=True)
class TaskProposal:
    """A task for given rows, with the columns that it reads."""

    task: str
    prompt: str
    target: str
    columns: ColumnNames | None
    """The columns that have other names than the task's."""
    metrics: tuple[str, ...] | None
    """Of `text`: scores that suit the targets; None: the task's own."""
    rows: tuple[Row, ...]
    """The rows that the task reads."""
    fault: str | None
    """What is wrong with the first row that it cannot read."""


def list_columns(rows: Sequence[RawRow]) -> dict[str, Any]:
    """Return column, or `column.field` of a column of records -> a value of it, in the order of the rows."""
    columns: dict[str, Any] = {}
    for raw in rows:
        for name, value in raw.items():
            parts = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {}
            for column, part in (parts or {str(name): value}).items():
                if columns.get(column) is None:
                    columns[column] = part
    return columns


def propose_task(
    rows: Sequence[RawRow],
    tasks: Mapping[str, Task],
    *,
    task: str | None = None,
    prompt: str | None = None,
    target: str | None = None,
) -> TaskProposal:
    """Return the first of `tasks` that reads at least `MIN_PARSED` of the rows, else `text`.

    task, prompt, target: What is chosen already. Raises ValueError, with the columns there are, for a column
    that is not there, or if no task reads the rows.
    """
    columns = list_columns(rows)
    for option, name in (("--prompt", prompt), ("--target", target)):
        if name is not None and name not in columns:
            raise ValueError(f"{option}: no column {name!r}; {suggest_choices(name, columns)}")
    faults: list[str] = []
    for name in [task] if task else [*(name for name in tasks if name != "text"), "text"]:
        pair = _choose_columns(name, tasks[name], columns, prompt, target, is_chosen=task is not None)
        if pair is None:
            continue
        proposal = _try_task(tasks[name], *pair, rows)
        if len(proposal.rows) >= MIN_PARSED * len(rows):
            return proposal
        faults.append(f"{name}: {proposal.fault}")
    shown = ", ".join(columns)
    if not faults:
        hint = "; `gkd-lab train` reads conversations" if "messages" in columns else ""
        raise ValueError(
            f"no two columns of text, a prompt and a target; the columns there are: {shown}{hint}"
        )
    raise ValueError(f"no task reads the rows; {faults[-1]}; the columns there are: {shown}")


def _choose_columns(
    name: str,
    task: Task,
    columns: Mapping[str, Any],
    prompt: str | None,
    target: str | None,
    *,
    is_chosen: bool,
) -> tuple[str, str] | None:
    """Return (prompt column, target column) of a task; None if the names do not suit it."""
    if name in _BUILT_IN_COLUMNS:  # it reads columns of two kinds, so no other names are guessed
        if is_chosen and prompt and target:
            return prompt, target
        reads = any(names <= columns.keys() for names in _BUILT_IN_COLUMNS[name])
        reads |= is_chosen and {"question", "answer"} <= columns.keys()
        pair = ("inputs", "targets") if "inputs" in columns else ("question", "answer")
        return pair if reads and {prompt, target} <= {None, *pair} else None
    if name == "text" or (is_chosen and name not in _ROLE_WORDS):
        words: tuple[Sequence[str], Sequence[str]] = (_PROMPT_WORDS, _TARGET_WORDS)
    else:
        words = _ROLE_WORDS[name]
    if name in _READS_ANY_TEXT and not is_chosen:
        stated = zip((prompt, target), words, strict=True)
        if any(column is not None and _find_column(names, [column]) is None for column, names in stated):
            return None
    texts = [column for column, value in columns.items() if _may_be_read(name, column, value)]
    prompt_column = prompt or _find_column((task.columns.get("prompt", ""), *words[0]), texts)
    others = [column for column in texts if column != prompt_column]
    target_column = target or _find_column((task.columns.get("target", ""), *words[1]), others)
    if name == "text" or is_chosen:
        if len(texts) == 2 and not prompt_column and not target_column:
            prompt_column, target_column = texts
        prompt_column = prompt_column or _pick_longest(columns, [c for c in texts if c != target_column])
        target_column = target_column or _pick_longest(columns, [c for c in texts if c != prompt_column])
    return None if prompt_column is None or target_column is None else (prompt_column, target_column)


def _may_be_read(task: str, column: str, value: Any) -> bool:
    """Return whether a column may be a prompt or target: of `text` a text, else what a parser may take."""
    if task == "text":
        return isinstance(value, str) and not _NO_TEXTS & set(_split_words(column))
    return isinstance(value, str | int | float | list)


def _find_column(words: Iterable[str], columns: Sequence[str]) -> str | None:
    """Return the column that is, or else has in its name, the first of the words that any has."""
    for word in filter(None, words):
        for has_word in (lambda c, w: c == w, lambda c, w: w in _split_words(c)):
            for column in columns:
                if has_word(column, word):
                    return column
    return None


def _split_words(column: str) -> list[str]:
    """Return the lower-case words of a column's name: `questionText`, `question_text` -> question, text."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", column)
    return [word for word in re.split(r"[^a-z]+", spaced.lower()) if word]


def _pick_longest(columns: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the column of these whose example is the longest; None of none."""
    return max(names, key=lambda name: len(str(columns[name])), default=None)


def _try_task(task: Task, prompt: str, target: str, rows: Sequence[RawRow]) -> TaskProposal:
    """Return the proposal of a task and two columns, with the rows that its parser reads."""
    names = {"prompt": prompt, "target": target}
    reads_itself = any({prompt, target} <= accepted for accepted in _BUILT_IN_COLUMNS.get(task.name, ()))
    reads_itself |= task.name == "translation" and (prompt, target) == ("translation.en", "translation.de")
    changes = {role: name for role, name in names.items() if name != task.columns.get(role)}
    columns = ColumnNames(**changes) if changes and not reads_itself else None
    parse_row = build_row_parser(task, False, columns)
    parsed, fault = [], None
    for raw in rows:
        try:
            parsed.append(parse_row(raw))
        except ValueError as error:
            fault = fault or str(error)
    metrics = _choose_metrics(prompt, target, parsed) if task.name == "text" else None
    return TaskProposal(task.name, prompt, target, columns, metrics, tuple(parsed), fault)


def _choose_metrics(prompt: str, target: str, rows: Sequence[Row]) -> tuple[str, ...]:
    """Return metrics of pairs of texts, the main one first: of translations, of short and of long targets."""
    languages = [_LANGUAGES & set(_split_words(name)) for name in (prompt, target)]
    if all(languages) and languages[0] != languages[1]:
        return ("bleu", "chrf")
    lengths = sorted(len(row.target.split()) for row in rows) or [0]
    return ("exact_match", "rougeL") if lengths[len(lengths) // 2] <= _SHORT_WORDS else ("rougeL", "rouge2")
