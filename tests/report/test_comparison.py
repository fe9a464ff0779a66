"""Two records side by side: paired where they share prompts, and said where they do not."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gkd_lab.config import Cell, ConfigError, Grid
from gkd_lab.report.comparison import Comparison, compare_records
from gkd_lab.report.comparison_text import (
    MAX_CHARACTERS,
    escape_text,
    format_comparison_json,
    print_comparison,
)
from gkd_lab.store import DamagedRecord, Store

from ..tables.prediction_records import (
    get_predictions_path,
    write_cell_record,
    write_predictions,
    write_reference_record,
)
from ..tables.synthetic_store import build_grid

MATCH = [{"decoding": "greedy", "metrics": ["exact_match", "rouge1"]}]
Rows = list[tuple[str, str, str]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "outputs")


def grid_of(**document: Any) -> Grid:
    return build_grid(**{"evaluations": MATCH, "grid": {"lmbda": [0, 1]}, **document})


def rows(right: int, of: int = 40, prefix: str = "") -> Rows:
    """The first `right` predictions are the reference."""
    return [(f"{prefix}{n}?", f"{n}" if n < right else "no", f"{n}") for n in range(of)]


def compared(store: Store, a: Rows, b: Rows, **options: Any) -> Comparison:
    ours, theirs = grid_of().cells
    return compare_records(write_cell_record(store, ours, a), write_cell_record(store, theirs, b), **options)


def text_of(found: Comparison, width: int = 100) -> str:
    out = io.StringIO()
    print_comparison(found, Console(file=out, width=width))
    return out.getvalue()


def test_cells_that_share_prompts_are_paired(store: Store) -> None:
    found = compared(store, rows(10), rows(30))
    assert (found.metric, found.evaluation, found.paired, found.n) == ("exact_match", "greedy", True, 40)
    assert (found.a.score, found.b.score, found.effect.mean) == (25.0, 75.0, 50.0)
    assert found.effect.low is not None and found.effect.high is not None
    # 50 +- 1.96 * 50 / sqrt(40), and no wider than that: the pairing
    assert 50 - 17.5 < found.effect.low < 40 and 60 < found.effect.high < 67.5
    assert found.effect.verdict == "higher"
    assert [one.name for one in found.differs] == ["source.lmbda", "source.temperature"]
    assert found.notes == ()
    assert "B is higher (paired bootstrap over examples)" in text_of(found)


def test_the_other_way_round_is_lower_and_the_same_is_undecided(store: Store) -> None:
    assert compared(store, rows(30), rows(10)).effect.verdict == "lower"
    same = compared(store, rows(10), rows(10))
    assert (same.effect.mean, same.effect.low, same.effect.verdict) == (0.0, 0.0, "undecided")
    assert same.examples == ()
    assert "undecided, the interval holds 0" in text_of(same)
    assert "no example of 40 scores differently" in text_of(same)


def test_the_examples_that_differ_most_come_first(store: Store) -> None:
    a = [(f"{n}?", "a b c d", "a b c d") for n in range(14)]
    b = [(f"{n}?", "a b c d"[: 7 - 2 * (n % 4)], "a b c d") for n in range(14)]
    found = compared(store, a, b, metric="rouge1")
    assert (found.differing, len(found.examples)) == (10, 10)
    assert [one.number for one in found.examples] == [4, 8, 12, 3, 7, 11, 2, 6, 10, 14]
    first = found.examples[0]
    assert (first.prompt, first.references, first.a, first.b) == ("3?", ("a b c d",), "a b c d", "a")
    assert (first.score_a, first.score_b) == (100.0, pytest.approx(40.0))
    assert "the 10 of 10 differing examples that differ most, of 14" in text_of(found)


def test_prompts_in_another_order_and_repeated_ones_find_their_own(store: Store) -> None:
    a = [("x", "right", "right"), ("x", "wrong", "right"), ("y", "right", "right")]
    b = [("y", "right", "right"), ("x", "right", "right"), ("x", "wrong", "right")]
    found = compared(store, a, b)
    assert (found.paired, found.n, found.differing, found.effect.mean) == (True, 3, 0, 0.0)


def test_prompts_that_only_one_has_are_left_out_and_counted(store: Store) -> None:
    found = compared(store, rows(10, of=40), rows(10, of=30))
    assert (found.paired, found.n, found.effect.mean) == (True, 30, 0.0)
    assert (found.a.n, found.b.n) == (40, 30)
    (note,) = found.notes
    assert note.startswith("paired over the 30 prompts that are the same, of 40 in A and 30 in B;")


def test_without_shared_prompts_it_is_not_paired_and_says_so(store: Store) -> None:
    found = compared(store, rows(10), [*rows(30, prefix="another "), rows(1)[0]])
    assert not found.paired
    assert (found.n, found.examples, found.differing) == (81, (), 0)
    assert found.effect.over == "bootstrap over the examples of each, not paired"
    assert found.notes == ("not paired: 1 prompts are the same, of 40 in A and 41 in B",)
    text = text_of(found)
    assert "note: not paired" in text and "differing examples" not in text


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_a_corpus_score_is_resampled_as_such(store: Store, metric: str) -> None:
    sentence = [f"the {'very ' * (n % 4)}wide river number {n} rose over its banks" for n in range(30)]
    same = list(zip(sentence, sentence, sentence, strict=True))
    worse = [(prompt, f"a {text[4:]} today", text) for prompt, text, _ in same]
    found = compared(store, worse, same, metric=metric)
    assert found.b.score == pytest.approx(100)
    assert found.effect.mean == pytest.approx(100 - found.a.score)
    assert found.effect.low is not None and 0 < found.effect.low <= found.effect.mean
    assert found.effect.verdict == "higher"
    # the mean of sentence scores is another number
    assert sum(one.score_b - one.score_a for one in found.examples) / 10 != pytest.approx(found.effect.mean)


def test_several_texts_of_a_prompt_are_one_example(store: Store) -> None:
    sampled = [{"decoding": "sample", "samples": 2, "metrics": ["exact_match"]}]
    ours, theirs = grid_of(evaluations=sampled).cells
    a = [("p", "1", "1"), ("p", "2", "1"), ("q", "1", "1"), ("q", "1", "1")]
    b = [("p", "1", "1"), ("p", "1", "1"), ("q", "1", "1"), ("q", "0", "1")]
    records = []
    for cell, written in ((ours, a), (theirs, b)):
        record = store.get_record(cell)
        record.write_spec(cell.training)
        write_predictions(record, cell.evaluations[0], written, samples=2)  # type: ignore[arg-type]
        records.append(record)
    found = compare_records(*records)
    assert (found.n, found.effect.mean) == (2, 0.0)
    assert [(one.prompt, one.score_a, one.score_b) for one in found.examples] == [
        ("p", 50.0, 100.0),
        ("q", 100.0, 50.0),
    ]


def test_a_cell_is_held_against_its_teacher_and_its_start(store: Store) -> None:
    cell = grid_of().cells[0]
    record = write_cell_record(store, cell, rows(10))
    start = write_reference_record(store, cell, "start", rows(5))
    teacher = write_reference_record(store, cell, "teacher", rows(40))
    from_start = compare_records(start, record)
    assert from_start.relation == "B started from A"
    assert [(one.name, one.a, one.b) for one in from_start.differs] == [("role", "start", "cell")]
    against = compare_records(record, teacher)
    assert against.relation == "A learnt from the teacher B"
    assert ("model.architecture.width", 8, 16) in [(one.name, one.a, one.b) for one in against.differs]
    assert "A learnt from the teacher B" in text_of(against)


def test_a_stored_score_of_an_older_metric_is_pointed_out(store: Store) -> None:
    ours, theirs = grid_of().cells
    a, b = write_cell_record(store, ours, rows(10)), write_cell_record(store, theirs, rows(10))
    part = b.get_evaluation(theirs.evaluations[0])
    scores = part.read_scores()
    scores["exact_match"]["value"] = 99.0
    (part.folder / "scores.json").write_text(json.dumps(scores))
    found = compare_records(a, b)
    assert found.b.score == 25.0
    assert found.notes == ("the stored score of B is 99.00: the metric has changed, `rescore` renews it",)


def test_json_holds_everything(store: Store) -> None:
    facts = json.loads(
        format_comparison_json(compared(store, rows(10), rows(30))), parse_constant=pytest.fail
    )
    assert facts["effect"]["verdict"] == "higher"
    assert facts["effect"]["mean"] == facts["b"]["score"] - facts["a"]["score"]
    assert len(facts["examples"]) == 10 and facts["differing"] == 20
    assert facts["a"]["role"] == "cell" and len(facts["a"]["fingerprint"]) == 8


def two(store: Store) -> tuple[Cell, Cell]:
    ours, theirs = grid_of().cells
    write_cell_record(store, ours, rows(10))
    write_cell_record(store, theirs, rows(30))
    return ours, theirs


def test_a_wrong_metric_or_evaluation_is_refused_with_the_nearest(store: Store) -> None:
    a, b = (store.get_record(cell) for cell in two(store))
    with pytest.raises(ConfigError, match=r"unknown metric 'exact_mach'; did you mean 'exact_match'\?"):
        compare_records(a, b, metric="exact_mach")
    with pytest.raises(
        ConfigError, match=r"unknown evaluation 'gredy'; did you mean 'greedy'\? valid: greedy"
    ):
        compare_records(a, b, evaluation="gredy")
    with pytest.raises(ConfigError, match="self_bleu compares several texts of one prompt"):
        compare_records(a, b, metric="self_bleu")
    assert compare_records(a, b, evaluation="greedy", metric="chrf").metric == "chrf"


def test_what_is_not_evaluated_is_refused_with_its_state(store: Store) -> None:
    ours, theirs = two(store)
    a, b = store.get_record(ours), store.get_record(theirs)
    b.get_evaluation(theirs.evaluations[0]).status_file.unlink()
    with pytest.raises(ConfigError, match="has no finished evaluation: it was not evaluated yet; run its"):
        compare_records(a, b)
    b.get_evaluation(theirs.evaluations[0]).mark_failed("ValueError: no luck")
    with pytest.raises(ConfigError, match=r"failed: greedy-.*: ValueError: no luck"):
        compare_records(a, b)
    b.status_file.unlink()
    with pytest.raises(ConfigError, match="its training is not finished"):
        compare_records(a, b)
    with b.lock(), pytest.raises(ConfigError, match="its training is running"):
        compare_records(a, b)


def test_evaluations_without_anything_in_common_are_refused(store: Store) -> None:
    ours, _ = two(store)
    other = grid_of(evaluations=[{"decoding": "beam"}]).cells[1]
    store.get_record(other).get_evaluation(grid_of().cells[1].evaluations[0]).status_file.unlink()
    write_cell_record(store, other, rows(10))
    with pytest.raises(ConfigError, match="no common evaluation: A has greedy; B has beam4"):
        compare_records(store.get_record(ours), store.get_record(other))


def test_evaluations_of_one_name_are_taken_for_each_other_and_it_is_said(store: Store) -> None:
    ours = grid_of().cells[0]
    theirs = grid_of(evaluations=[{"decoding": "greedy", "examples": 20, "metrics": ["exact_match"]}]).cells[
        1
    ]
    found = compare_records(
        write_cell_record(store, ours, rows(10)), write_cell_record(store, theirs, rows(10, of=20))
    )
    assert found.n == 20
    assert any(note.startswith("the evaluations share a name, not all settings") for note in found.notes)


def test_damaged_predictions_are_named(store: Store) -> None:
    ours, theirs = two(store)
    path = get_predictions_path(store.get_record(theirs), theirs)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedRecord, match=r"predictions\.jsonl:40: expected a JSON object"):
        compare_records(store.get_record(ours), store.get_record(theirs))


def test_long_texts_are_cut_and_no_text_steers_the_terminal(store: Store) -> None:
    long = "word " * 1000
    a = [("\x1b[2Jclear?", "\x1b]0;title\x07[bold]x[/bold]", "y"), ("q", "", "word")]
    b = [("\x1b[2Jclear?", "y", "y"), ("q", long, "word")]
    text = text_of(compared(store, a, b, metric="chrf"))
    assert "\x1b" not in text and "\x07" not in text
    assert "\\x1b[2Jclear?" in text and "[bold]x[/bold]" in text
    assert "(empty)" in text
    assert f"({len(long) - MAX_CHARACTERS} more characters)" in text
    assert all(len(line) <= 100 for line in text.splitlines() if "word word" in line)
    assert escape_text("ok\nline").plain == "ok\nline"
