"""Comparison of two records: pairing by prompt, differences, notes and refusals."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

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

EVALUATIONS = [{"decoding": "greedy", "metrics": ["exact_match", "rouge1"]}]
PredictionRows = list[tuple[str, str, str]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "outputs")


def build_metric_grid(**document: Any) -> Grid:
    return build_grid(**{"evaluations": EVALUATIONS, "grid": {"lmbda": [0, 1]}, **document})


def build_rows(right: int, count: int = 40, prefix: str = "") -> PredictionRows:
    """Build predictions of which the first `right` equal the reference."""
    return [(f"{prefix}{n}?", f"{n}" if n < right else "no", f"{n}") for n in range(count)]


def compare_predictions(store: Store, a: PredictionRows, b: PredictionRows, **options: Any) -> Comparison:
    cell_a, cell_b = build_metric_grid().cells
    return compare_records(
        write_cell_record(store, cell_a, a), write_cell_record(store, cell_b, b), **options
    )


def render_text(comparison: Comparison, width: int = 100) -> str:
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, width=width))
    return out.getvalue()


def test_cells_that_share_prompts_are_paired(store: Store) -> None:
    comparison = compare_predictions(store, build_rows(10), build_rows(30))
    assert (comparison.metric, comparison.evaluation, comparison.paired, comparison.n) == (
        "exact_match",
        "greedy",
        True,
        40,
    )
    assert (comparison.a.score, comparison.b.score, comparison.effect.mean) == (25.0, 75.0, 50.0)
    assert comparison.effect.low is not None and comparison.effect.high is not None
    # 20 of 40 examples differ by 100: standard deviation 50.637, t(0.975, 39) = 2.02269
    assert (comparison.effect.low, comparison.effect.high) == pytest.approx((33.805, 66.195), abs=1e-3)
    assert comparison.effect.p == pytest.approx(2 * stats.t.sf(39**0.5, 39))
    assert comparison.effect.verdict == "higher"
    assert [field.name for field in comparison.differs] == ["source.lmbda", "source.temperature"]
    assert comparison.notes == ()
    assert "B is higher (over 40 examples, paired; other seeds not covered)" in render_text(comparison)


def test_a_negative_difference_is_lower_and_none_is_undecided(store: Store) -> None:
    assert compare_predictions(store, build_rows(30), build_rows(10)).effect.verdict == "lower"
    unchanged = compare_predictions(store, build_rows(10), build_rows(10))
    assert (unchanged.effect.mean, unchanged.effect.verdict) == (0.0, "undecided")
    # one of 40 examples may differ: 2.5 * t(0.975, 39)
    assert unchanged.effect.high == pytest.approx(5.0567, abs=1e-3)
    assert unchanged.examples == ()
    assert "undecided" in render_text(unchanged)
    assert "no example of 40" in render_text(unchanged)


def test_the_examples_that_differ_most_come_first(store: Store) -> None:
    a = [(f"{n}?", "a b c d", "a b c d") for n in range(14)]
    b = [(f"{n}?", "a b c d"[: 7 - 2 * (n % 4)], "a b c d") for n in range(14)]
    comparison = compare_predictions(store, a, b, metric="rouge1")
    assert (comparison.differing, len(comparison.examples)) == (10, 10)
    assert [example.number for example in comparison.examples] == [4, 8, 12, 3, 7, 11, 2, 6, 10, 14]
    first = comparison.examples[0]
    assert (first.prompt, first.references, first.a, first.b) == ("3?", ("a b c d",), "a b c d", "a")
    assert (first.score_a, first.score_b) == (100.0, pytest.approx(40.0))
    assert re.search("10 of 10 differing examples .*, of 14", render_text(comparison))


def test_reordered_and_repeated_prompts_are_matched(store: Store) -> None:
    a = [("x", "right", "right"), ("x", "wrong", "right"), ("y", "right", "right")]
    b = [("y", "right", "right"), ("x", "right", "right"), ("x", "wrong", "right")]
    comparison = compare_predictions(store, a, b)
    assert (comparison.paired, comparison.n, comparison.differing, comparison.effect.mean) == (
        True,
        3,
        0,
        0.0,
    )


def test_unshared_prompts_are_excluded_and_counted(store: Store) -> None:
    comparison = compare_predictions(store, build_rows(10, count=40), build_rows(10, count=30))
    assert (comparison.paired, comparison.n, comparison.effect.mean) == (True, 30, 0.0)
    assert (comparison.a.n, comparison.b.n) == (40, 30)
    (note,) = comparison.notes
    assert "30 prompts" in note and "40 in A and 30 in B" in note


def test_records_without_shared_prompts_are_not_paired(store: Store) -> None:
    comparison = compare_predictions(
        store, build_rows(10), [*build_rows(30, prefix="another "), build_rows(1)[0]]
    )
    assert not comparison.paired
    assert (comparison.n, comparison.examples, comparison.differing) == (81, (), 0)
    assert "not paired" in comparison.effect.over
    (note,) = comparison.notes
    assert note.startswith("not paired: 1 prompts") and note.endswith("40 in A and 41 in B")
    text = render_text(comparison)
    assert "note: not paired" in text and "differing examples" not in text


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_a_corpus_score_is_resampled_as_a_corpus_score(store: Store, metric: str) -> None:
    sentence = [f"the {'very ' * (n % 4)}wide river number {n} rose over its banks" for n in range(30)]
    unchanged = list(zip(sentence, sentence, sentence, strict=True))
    worse = [(prompt, f"a {text[4:]} today", text) for prompt, text, _ in unchanged]
    comparison = compare_predictions(store, worse, unchanged, metric=metric)
    assert comparison.b.score == pytest.approx(100)
    assert comparison.effect.mean == pytest.approx(100 - comparison.a.score)
    assert comparison.effect.low is not None and 0 < comparison.effect.low <= comparison.effect.mean
    assert comparison.effect.verdict == "higher"
    # the mean of sentence scores is another number
    assert sum(example.score_b - example.score_a for example in comparison.examples) / 10 != pytest.approx(
        comparison.effect.mean
    )


def test_several_samples_of_a_prompt_are_one_example(store: Store) -> None:
    sampled = [{"decoding": "sample", "samples": 2, "metrics": ["exact_match"]}]
    cell_a, cell_b = build_metric_grid(evaluations=sampled).cells
    a = [("p", "1", "1"), ("p", "2", "1"), ("q", "1", "1"), ("q", "1", "1")]
    b = [("p", "1", "1"), ("p", "1", "1"), ("q", "1", "1"), ("q", "0", "1")]
    records = []
    for cell, written in ((cell_a, a), (cell_b, b)):
        record = store.get_record(cell)
        record.write_spec(cell.training)
        write_predictions(record, cell.evaluations[0], written, samples=2)  # type: ignore[arg-type]
        records.append(record)
    comparison = compare_records(*records)
    assert (comparison.n, comparison.effect.mean) == (2, 0.0)
    assert [(example.prompt, example.score_a, example.score_b) for example in comparison.examples] == [
        ("p", 50.0, 100.0),
        ("q", 100.0, 50.0),
    ]


def test_a_cell_is_compared_with_its_teacher_and_its_sft_student(store: Store) -> None:
    cell = build_metric_grid().cells[0]
    record = write_cell_record(store, cell, build_rows(10))
    start = write_reference_record(store, cell, "start", build_rows(5))
    teacher = write_reference_record(store, cell, "teacher", build_rows(40))
    start_comparison = compare_records(start, record)
    assert start_comparison.relation == "B started from A"
    assert [(field.name, field.a, field.b) for field in start_comparison.differs] == [
        ("role", "start", "cell")
    ]
    teacher_comparison = compare_records(record, teacher)
    assert teacher_comparison.relation == "A learnt from the teacher B"
    assert ("model.architecture.width", 8, 16) in [
        (field.name, field.a, field.b) for field in teacher_comparison.differs
    ]
    assert teacher_comparison.relation in render_text(teacher_comparison)


def test_an_outdated_stored_score_is_noted(store: Store) -> None:
    cell_a, cell_b = build_metric_grid().cells
    a, b = write_cell_record(store, cell_a, build_rows(10)), write_cell_record(store, cell_b, build_rows(10))
    evaluation = b.get_evaluation(cell_b.evaluations[0])
    scores = evaluation.read_scores()
    scores["exact_match"]["value"] = 99.0
    (evaluation.folder / "scores.json").write_text(json.dumps(scores))
    comparison = compare_records(a, b)
    assert comparison.b.score == 25.0
    assert len(comparison.notes) == 1 and "B is 99.00" in comparison.notes[0]


def test_scores_have_the_intervals_of_the_table(store: Store) -> None:
    comparison = compare_predictions(store, build_rows(10), build_rows(30))
    cell = build_metric_grid().cells[0]
    stored = store.get_record(cell).get_evaluation(cell.evaluations[0]).read_scores()["exact_match"]
    assert (comparison.a.low, comparison.a.high) == (stored["low"], stored["high"])


def test_json_has_every_field(store: Store) -> None:
    fields = json.loads(
        format_comparison_json(compare_predictions(store, build_rows(10), build_rows(30))),
        parse_constant=pytest.fail,
    )
    assert list(fields["effect"]) == ["mean", "low", "high", "pairs", "over", "p", "verdict"]
    assert fields["effect"]["verdict"] == "higher"
    assert fields["effect"]["mean"] == fields["b"]["score"] - fields["a"]["score"]
    assert len(fields["examples"]) == 10 and fields["differing"] == 20
    assert fields["a"]["role"] == "cell" and len(fields["a"]["fingerprint"]) == 8


def write_two_cells(store: Store) -> tuple[Cell, Cell]:
    cell_a, cell_b = build_metric_grid().cells
    write_cell_record(store, cell_a, build_rows(10))
    write_cell_record(store, cell_b, build_rows(30))
    return cell_a, cell_b


def test_an_unknown_metric_or_evaluation_is_refused_with_the_nearest_name(store: Store) -> None:
    a, b = (store.get_record(cell) for cell in write_two_cells(store))
    with pytest.raises(ConfigError, match=r"exact_mach.*exact_match"):
        compare_records(a, b, metric="exact_mach")
    with pytest.raises(ConfigError, match=r"gredy.*greedy"):
        compare_records(a, b, evaluation="gredy")
    with pytest.raises(ConfigError, match="self_bleu"):
        compare_records(a, b, metric="self_bleu")
    assert compare_records(a, b, evaluation="greedy", metric="chrf").metric == "chrf"


def test_an_unfinished_record_is_refused_with_its_state(store: Store) -> None:
    cell_a, cell_b = write_two_cells(store)
    a, b = store.get_record(cell_a), store.get_record(cell_b)
    b.get_evaluation(cell_b.evaluations[0]).status_file.unlink()
    with pytest.raises(ConfigError, match="not evaluated"):
        compare_records(a, b)
    b.get_evaluation(cell_b.evaluations[0]).mark_failed("ValueError: no luck")
    with pytest.raises(ConfigError, match=r"greedy-.*: ValueError: no luck"):
        compare_records(a, b)
    b.status_file.unlink()
    with pytest.raises(ConfigError, match="not finished"):
        compare_records(a, b)
    with b.lock(), pytest.raises(ConfigError, match="running"):
        compare_records(a, b)


def test_records_without_a_common_evaluation_are_refused(store: Store) -> None:
    cell_a, _ = write_two_cells(store)
    other = build_metric_grid(evaluations=[{"decoding": "beam"}]).cells[1]
    store.get_record(other).get_evaluation(build_metric_grid().cells[1].evaluations[0]).status_file.unlink()
    write_cell_record(store, other, build_rows(10))
    with pytest.raises(ConfigError, match=r"A has greedy; B has beam4"):
        compare_records(store.get_record(cell_a), store.get_record(other))


def test_evaluations_that_share_only_a_name_are_compared_with_a_note(store: Store) -> None:
    cell_a = build_metric_grid().cells[0]
    cell_b = build_metric_grid(
        evaluations=[{"decoding": "greedy", "examples": 20, "metrics": ["exact_match"]}]
    ).cells[1]
    comparison = compare_records(
        write_cell_record(store, cell_a, build_rows(10)),
        write_cell_record(store, cell_b, build_rows(10, count=20)),
    )
    assert comparison.n == 20
    assert any("share a name" in note for note in comparison.notes)


def test_damaged_predictions_are_named(store: Store) -> None:
    cell_a, cell_b = write_two_cells(store)
    path = get_predictions_path(store.get_record(cell_b), cell_b)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedRecord, match=r"predictions\.jsonl:40: "):
        compare_records(store.get_record(cell_a), store.get_record(cell_b))


def test_long_texts_are_cut_and_no_text_steers_the_terminal(store: Store) -> None:
    long = "word " * 1000
    a = [("\x1b[2Jclear?", "\x1b]0;title\x07[bold]x[/bold]", "y"), ("q", "", "word")]
    b = [("\x1b[2Jclear?", "y", "y"), ("q", long, "word")]
    text = render_text(compare_predictions(store, a, b, metric="chrf"))
    assert "\x1b" not in text and "\x07" not in text
    assert "\\x1b[2Jclear?" in text and "[bold]x[/bold]" in text
    assert "(empty)" in text
    assert f"({len(long) - MAX_CHARACTERS} more characters)" in text
    assert all(len(line) <= 100 for line in text.splitlines() if "word word" in line)
    assert escape_text("ok\nline").plain == "ok\nline"
