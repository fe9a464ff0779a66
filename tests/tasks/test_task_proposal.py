"""A task is proposed for rows of unknown form: one whose parser reads them, else `text`."""

from typing import Any

import pytest

from gkd_lab.tasks import TASKS
from gkd_lab.tasks.task_proposal import list_columns, propose_task

EXPECTED: list[tuple[dict[str, Any], str, str, str, tuple[str, ...] | None]] = [
    ({"question": "1 + 1?", "answer": "1 + 1 = 2 #### 2"}, "arithmetic", "question", "answer", None),
    ({"question_text": "1 + 1?", "solution": "#### 2"}, "arithmetic", "question_text", "solution", None),
    (
        {"id": "", "problemText": "1 + 1?", "finalAnswer": 2},
        "arithmetic",
        "problemText",
        "finalAnswer",
        None,
    ),
    ({"document": "It rained.", "summary": "Rain."}, "summarization", "document", "summary", None),
    (
        {"id": "x", "article": "It rained.", "highlights": "Rain."},
        "summarization",
        "article",
        "highlights",
        None,
    ),
    ({"en": "house", "de": "Haus"}, "translation", "en", "de", None),
    ({"tgt_de": "Haus", "src_en": "house"}, "translation", "src_en", "tgt_de", None),
    ({"translation": {"en": "a", "de": "b"}}, "translation", "translation.en", "translation.de", None),
    ({"translation": {"en": "a", "fr": "b"}}, "text", "translation.en", "translation.fr", ("bleu", "chrf")),
    ({"cs": "dům", "pl": "dom"}, "text", "cs", "pl", ("bleu", "chrf")),
    ({"inputs": "Name a colour.", "targets": "blue"}, "instruction", "inputs", "targets", None),
    ({"question": "q", "answer": "A", "choices": ["x", "y"]}, "instruction", "question", "answer", None),
    ({"sentence": "good", "label": "positive"}, "classification", "sentence", "label", None),
    ({"sentence": "good", "label": 0.5}, "scoring", "sentence", "label", None),
    ({"tokens": ["the"], "tags": ["O"]}, "tagging", "tokens", "tags", None),
    ({"question": "Capital?", "answer": "Paris"}, "text", "question", "answer", ("exact_match", "rougeL")),
    ({"uid": "7", "left": "a b", "right": "c"}, "text", "left", "right", ("exact_match", "rougeL")),
    (
        {"response": "w " * 9, "instruction": "Say w."},
        "text",
        "instruction",
        "response",
        ("rougeL", "rouge2"),
    ),
]


@pytest.mark.parametrize(("row", "task", "prompt", "target", "metrics"), EXPECTED)
def test_a_task_is_proposed_with_its_columns(
    row: dict[str, Any], task: str, prompt: str, target: str, metrics: tuple[str, ...] | None
) -> None:
    proposal = propose_task([row] * 10, TASKS)
    assert (proposal.task, proposal.prompt, proposal.target) == (task, prompt, target)
    assert proposal.metrics == metrics
    assert len(proposal.rows) == 10


@pytest.mark.parametrize("row", [row for row, *_ in EXPECTED])
def test_the_proposed_columns_read_the_row_as_the_task_does(row: dict[str, Any]) -> None:
    from gkd_lab.tasks.row_format import build_row_parser

    proposal = propose_task([row], TASKS)
    parse_row = build_row_parser(TASKS[proposal.task], False, proposal.columns)
    assert (parse_row(row),) == proposal.rows
    changes = {} if proposal.columns is None else proposal.columns.model_dump(exclude_none=True)
    assert all(changes[role] != TASKS[proposal.task].columns[role] for role in changes)


def test_a_few_rows_that_the_task_cannot_read_are_reported_and_more_end_it() -> None:
    good, bad = {"question": "1 + 1?", "answer": "2"}, {"question": "why?", "answer": "because"}
    proposal = propose_task([good] * 18 + [bad] * 2, TASKS)
    assert proposal.task == "arithmetic"
    assert proposal.fault is not None
    assert "must be a number" in proposal.fault
    assert propose_task([good] * 17 + [bad] * 3, TASKS).task == "text"


def test_what_is_chosen_already_is_kept() -> None:
    rows = [{"a": "long text of a", "b": "b", "c": "c"}]
    proposal = propose_task(rows, TASKS, task="summarization", prompt="b")
    assert (proposal.task, proposal.prompt, proposal.target) == ("summarization", "b", "a")
    proposal = propose_task(rows, TASKS, prompt="c", target="b")
    assert (proposal.task, proposal.prompt, proposal.target) == ("text", "c", "b")
    reverse = propose_task([{"en": "house", "de": "Haus"}], TASKS, prompt="de", target="en")
    assert (reverse.task, reverse.prompt, reverse.target) == ("text", "de", "en")
    assert reverse.metrics == ("bleu", "chrf")
    sums = propose_task([{"a": "1 + 1", "b": "2"}], TASKS, prompt="a", target="b")
    assert (sums.task, sums.prompt, sums.target) == ("arithmetic", "a", "b")


WRONG: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"a": "x", "b": "y"}, {"prompt": "aa"}, "--prompt: no column 'aa'; did you mean 'a'? valid: a, b"),
    ({"a": "x", "b": "y"}, {"target": "z"}, "--target: no column 'z'; valid: a, b"),
    ({"a": "x"}, {}, "no two columns of text, a prompt and a target; the columns there are: a"),
    ({"messages": [{"role": "user"}]}, {}, "`gkd-lab train` reads conversations"),
    (
        {"a": "x", "b": "y"},
        {"task": "arithmetic"},
        "no task reads the rows; arithmetic: field 'answer'",
    ),
]


@pytest.mark.parametrize(("row", "chosen", "message"), WRONG)
def test_rows_that_no_task_reads_are_refused_with_their_columns(
    row: dict[str, Any], chosen: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        propose_task([row], TASKS, **chosen)
    assert message in str(caught.value)


def test_columns_are_those_of_all_rows_with_the_fields_of_records() -> None:
    rows = [{"a": None, "t": {"en": "x"}}, {"a": "text", "b": 1}]
    assert list_columns(rows) == {"a": "text", "t.en": "x", "b": 1}
