"""The HTML report: self-contained, escaped, with results, failures and samples."""

import cProfile
import pstats
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gkd_lab.config import Grid
from gkd_lab.report.html_report import _build_point_key, _build_score_rows, write_report
from gkd_lab.report.samples import MAX_CHARACTERS, select_samples, shorten_text
from gkd_lab.report.summary_text import describe_results
from gkd_lab.statistics.differences import compute_start_differences
from gkd_lab.statistics.example_scores import find_no_examples
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.scores import select_scores

from ..tables.synthetic_store import build_grid, fill_store, write_finished_record


class Page(HTMLParser):
    """Parses a page into its tags with attributes and its visible text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.is_hidden = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.is_hidden = tag in ("style", "title")

    def handle_endtag(self, tag: str) -> None:
        self.is_hidden = False

    def handle_data(self, data: str) -> None:
        if not self.is_hidden:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def render_page(grid: Grid, store: Store, tmp_path: Path) -> tuple[str, Page]:
    """Write the report of a grid; return its source and the parsed page."""
    source = write_report(grid, store, tmp_path / "report.html").read_text(encoding="utf-8")
    return source, Page(source)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "outputs")


def test_the_page_makes_no_request(store: Store, tmp_path: Path) -> None:
    grid = build_grid()
    fill_store(grid, store)
    source, page = render_page(grid, store, tmp_path)
    assert not {"script", "link", "iframe", "img", "object", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    for css in re.findall(r"<style>.*?</style>", source, flags=re.DOTALL):
        assert "url(" not in css and "@import" not in css
    assert "http" not in source
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_describes_the_effects_of_lmbda_and_beta(store: Store, tmp_path: Path) -> None:
    grid = build_grid(description="A question.", paper={"figures": ["7", "A.14"], "claims": ["C1"]})
    fill_store(grid, store)
    _, page = render_page(grid, store, tmp_path)
    assert "A question." in page.text
    assert "figures 7, A.14 · claims C1" in page.text
    assert "All 9 cells are done" in page.text
    assert "λ = 1, Forward KL with 70.0 [67.0, 73.0] over examples, 40.0 above" in page.text
    assert "SFT student (30.0)" in page.text and "25.0 below the teacher (95.0)" in page.text
    assert "span 4.0: from 66.0 (Reverse KL) to 70.0 (Forward KL)" in page.text
    assert "fewer than 3 seeds do not tell how much of it is chance" in page.text
    assert "+30.0 on average over 3 pairs of cells that differ in λ only: undecided" in page.text
    assert sum(attributes.get("role") == "img" for _, attributes in page.tags) == 4
    assert re.search(r"55\.0 52\.0 to 58\.0 examples 1 \+25\.0 undecided done", page.text)
    assert re.search(r"70\.0 67\.0 to 73\.0 .* 1 \+40\.0 \[\+2\d\.\d, \+5\d\.\d\] undecided done", page.text)
    assert "One seed does not decide" in page.text
    assert "torch 2.13.0" in page.text


def test_an_interval_around_zero_is_undecided(store: Store, tmp_path: Path) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "seed": [0, 1]})
    fill_store(grid, store, score=lambda cell: 40.0 + 2 * (1 - 2 * cell.seed) * cell.lmbda)
    _, page = render_page(grid, store, tmp_path)
    assert "λ only: undecided (2 seeds x 50 examples, crossed)" in page.text


def test_three_seeds_decide_and_the_span_is_corrected(store: Store, tmp_path: Path) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "beta": [0, 1], "seed": [0, 1, 2]})
    fill_store(grid, store, score=lambda cell: 40.0 + 40 * cell.lmbda - 8 * (cell.beta or 0) + 2 * cell.seed)
    _, page = render_page(grid, store, tmp_path)
    assert "2 of 4 students are higher, 0 lower, 2 undecided (4 comparisons, Holm-adjusted" in page.text
    assert re.search(r"λ only: higher \(3 seeds x 50 examples, crossed\)", page.text)
    assert re.search(
        r"span 8\.0: .* to 82\.0 \(Forward KL\); \+\d\.\d \[.*\] if chance is removed "
        r"\(3 seeds x 50 examples, crossed; bias of choosing removed\)",
        page.text,
    )
    assert re.search(
        r"with 82\.0 \[.*\] over seeds x examples, .*; 8\d\.\d \[.*\] without the bias of choosing",
        page.text,
    )
    assert "seeds x examples 3 +" in page.text


def test_ten_samples_have_completions_of_sft_student_best_cell_and_teacher(
    store: Store, tmp_path: Path
) -> None:
    grid = build_grid()
    fill_store(grid, store)
    best = grid.cells[6]
    samples = select_samples(store, best)
    assert [sample["number"] for sample in samples] == [1, 6, 11, 16, 21, 26, 31, 36, 41, 46]
    assert set(samples[0]["outputs"]) == {"start", "cell", "teacher"}
    _, page = render_page(grid, store, tmp_path)
    assert "Best cell: λ = 1, Forward KL, seed 0" in page.text
    assert page.text.count("1. prompt") == 5  # 1, 11, 21, 31, 41


def test_markup_in_predictions_and_errors_is_escaped(store: Store, tmp_path: Path) -> None:
    grid = build_grid(description="<b>bold</b> & co")
    fill_store(grid, store, text='<script>alert("x")</script><img src=x onerror=y>')
    store.get_record(grid.cells[0]).mark_failed("<i>broken</i>", "<u>trace</u>")
    source, page = render_page(grid, store, tmp_path)
    assert not {"script", "img", "b", "i", "u"} & {tag for tag, _ in page.tags}
    assert '<script>alert("x")</script><img src=x onerror=y>' in page.text
    assert "&lt;script&gt;" in source
    assert "<i>broken</i>" in page.text and "<u>trace</u>" in page.text


def test_failures_are_listed_with_error_and_folder(store: Store, tmp_path: Path) -> None:
    grid = build_grid()
    fill_store(grid, store, cells=grid.cells[2:])
    store.get_record(grid.cells[0]).mark_failed("RuntimeError: out of memory", "Traceback: line 1")
    partly_failed = store.get_record(grid.cells[1])
    write_finished_record(partly_failed, grid.cells[1], 40.0)
    partly_failed.get_evaluation(grid.cells[1].evaluations[0]).mark_failed("ValueError: no answer")
    _, page = render_page(grid, store, tmp_path)
    assert "7 of 9 cells are done" in page.text
    assert "arithmetic, λ = 0, β = 0, seed 0" in page.text
    assert "RuntimeError: out of memory" in page.text and "Traceback: line 1" in page.text
    assert "ValueError: no answer" in page.text
    assert grid.cells[0].folder in page.text
    assert str(tmp_path) not in page.text


def test_a_grid_with_nothing_done_has_a_page(store: Store, tmp_path: Path) -> None:
    _, page = render_page(build_grid(), store, tmp_path)
    assert "none of the 9 cells" in page.text
    assert "No cell of this task" in page.text
    assert "No record" in page.text


def test_each_task_has_a_section_with_its_own_metric(store: Store, tmp_path: Path) -> None:
    grid = build_grid(grid={"task": ["arithmetic", "translation"], "lmbda": [0, 1]})
    fill_store(grid, store, cells=grid.cells[:3])
    _, page = render_page(grid, store, tmp_path)
    assert "greedy/accuracy" in page.text and "greedy/bleu" in page.text
    assert "No pair of cells at λ = 0 and 1" in page.text


def test_every_number_that_a_verdict_rests_on_stands_beside_it(store: Store, tmp_path: Path) -> None:
    axes = {"lmbda": [0, 0.5, 1], "beta": [0, 1], "seed": [0, 1, 2]}
    grid = build_grid(grid=axes, paper={"claims": ["C1", "C3"]})
    fill_store(grid, store, score=lambda cell: 40.0 + 40 * cell.lmbda + 2 * cell.seed)
    _, page = render_page(grid, store, tmp_path)
    basis = "rests on 3 seeds x 50 examples, crossed; one SFT student 2 comparisons"
    # the claim: effect, interval, margin, seeds, examples; the paper's
    assert re.search(
        rf"C1 On-policy .* holds \+40\.00 \+\d+\.\d\d to .* 0 3 50 fails 54 of 55 2 of 2 hold; {basis}",
        page.text,
    )
    assert re.search(r"C3 Only student-written .* \+20\.00 .* 1\.3 3 50 fails 48 of 55", page.text)
    header = "column comparison outcome effect 95 % interval seeds examples "
    assert re.search(
        header + r"forward KL against fixed data \(λ = 0\) holds \+40\.00 \+\d.* 3 50", page.text
    )


def test_the_paper_is_shown_where_the_experiment_names_it_or_on_request(store: Store, tmp_path: Path) -> None:
    axes = {"lmbda": [0, 0.5, 1], "beta": [0, 0.1, 0.5, 0.9, 1]}
    plain, named = build_grid(grid=axes), build_grid(grid=axes, paper={"figures": ["7"]})
    fill_store(plain, store)
    for grid, with_paper, is_shown in (
        (plain, None, False),
        (plain, True, True),
        (named, None, True),
        (named, False, False),
    ):
        page = write_report(grid, store, tmp_path / "r.html", with_paper=with_paper).read_text(
            encoding="utf-8"
        )
        assert ("The paper's claims" in page, "Beside the paper" in page) == (is_shown, is_shown)


def test_a_grid_of_methods_has_bars_instead_of_maps(store: Store, tmp_path: Path) -> None:
    grid = build_grid(grid={"method": ["imitkd", "gkd"], "beta": [0.1, 1], "seed": [0, 1]})
    fill_store(grid, store)
    _, page = render_page(grid, store, tmp_path)
    assert "greedy/accuracy by method: means with 95 % intervals over seeds" in page.text
    assert "On-policy GKD, JSD(0.1)" in page.text and "Each square is" not in page.text


def test_a_grid_of_rows_has_lines_with_the_starts(store: Store, tmp_path: Path) -> None:
    student = {"layers": 1, "width": 8, "heads": 2, "init_seed": "cell", "sft": {"steps": 4}}
    axes = {"student.sft.rows": [5, 10, 20], "lmbda": [0, 1], "seed": [0, 1]}
    grid = build_grid(student=student, grid=axes)
    fill_store(grid, store)
    page = write_report(grid, store, tmp_path / "r.html").read_text()
    assert "against the rows of SFT and distillation" in page and "Heat map of" not in page
    assert "What the students start from and train on" in page
    assert page.count("start arithmetic/custom, ") == 6  # 3 numbers of rows, 2 seeds


def test_methods_are_compared_over_all_tasks(store: Store, tmp_path: Path) -> None:
    grid = build_grid(
        task=None, grid={"task": ["arithmetic", "translation"], "lmbda": [0, 1], "seed": [0, 1]}
    )
    fill_store(grid, store)
    _, page = render_page(grid, store, tmp_path)
    assert "Over all tasks arithmetic; translation. Scores are normalised" in page.text
    assert "(2 tasks x 2 seeds, stratified bootstrap)" in page.text
    assert "share of runs above" in page.text
    fill_store(alone := build_grid(), store)
    assert "Over all" not in render_page(alone, store, tmp_path)[1].text


def test_a_collapsed_cell_is_reported_at_each_combination(store: Store, tmp_path: Path) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "temperature": [0.5, 1.0]})
    fill_store(grid, store)
    _, page = render_page(grid, store, tmp_path)
    for temperature in ("0.5", "1.0"):
        assert f"student 0 JSD(0.5) {temperature} 38.0 35.0 to 41.0" in page.text


def test_the_page_names_total_variation(store: Store, tmp_path: Path) -> None:
    grid = build_grid(grid={"divergence": ["tv", "jsd"], "lmbda": [0, 1], "beta": [0.5, 1]})
    failed, *other_cells = grid.cells
    fill_store(grid, store, cells=[cell for cell in other_cells if cell.beta != 1])
    store.get_record(failed).mark_failed("ValueError: broken")
    _, page = render_page(grid, store, tmp_path)
    assert "Best of 3: λ = 1, Total variation with 69.0" in page.text
    assert "68.0 (JSD(0.5)) to 69.0 (Total variation)" in page.text
    assert "λ = 1, Total variation, seed 0" in page.text
    assert "student 0 Total variation 0 failed student 1 Total variation 69.0 66.0 to 72.0" in page.text
    assert "arithmetic, λ = 0, total variation, seed 0" in page.text


def test_losses_without_beta_have_rows_of_their_own(store: Store, tmp_path: Path) -> None:
    """SeqKD and SFT train with cross-entropy, f-distill with total variation."""
    grid = build_grid(grid={"method": ["seqkd", "f_distill"]})
    fill_store(grid, store)
    _, page = render_page(grid, store, tmp_path)
    assert "student 0 Cross entropy seqkd 39.0" in page.text  # 40 - 4 / 4
    assert "student 0.5 Total variation f_distill 54.0" in page.text


@pytest.mark.parametrize("lmbdas", ([0], [0, 1]))
def test_losses_are_named_by_their_terms(lmbdas: list[int], store: Store, tmp_path: Path) -> None:
    objectives = [[{"beta": 0}], [{"beta": 0}, {"type": "adversarial", "gradient_penalty": 2, "weight": 0.5}]]
    grid = build_grid(grid={"lmbda": lmbdas, "objectives": objectives})
    fill_store(grid, store)
    source, page = render_page(grid, store, tmp_path)
    assert "Forward KL; Forward KL + 0.5 adversarial (gradient penalty 2)" in page.text
    assert "Best of" in page.text and "terms of the loss" in page.text
    assert re.search(
        r"student 0 Forward KL Forward KL \+ 0\.5 adversarial \(gradient penalty 2\) \d", page.text
    )
    assert "gradient_penalty" not in source
    assert "Each square is" not in page.text


def test_long_texts_are_shortened() -> None:
    assert shorten_text("a" * MAX_CHARACTERS) == "a" * MAX_CHARACTERS
    assert shorten_text("a" * (MAX_CHARACTERS + 5)).endswith("... (5 more characters)")


def test_the_page_shows_paired_heat_maps_and_claims(store: Store, tmp_path: Path) -> None:
    grid = build_grid(
        grid={"lmbda": [0, 0.5, 1], "beta": [0, 0.1, 0.5, 0.9, 1]}, paper={"claims": ["C1", "C9"]}
    )
    fill_store(grid, store)
    page = write_report(grid, store, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Beside the paper" in page and "the paper: Figure A.14" in page
    assert "correlation over 15 cells" in page
    claims = page.split("The paper's claims</h2>")[1]
    assert "<td>C1</td>" in claims and "54 of 55" in claims
    assert "task translation" in claims  # C9 is named by the experiment: the reason why it is not judged
    assert "<td>C20</td>" not in claims


def count_calls(grid: Grid, outputs: Path) -> int:
    """Return how many functions are called to compute a report's numbers, its figures apart."""
    frame = build_long_table(grid, Store(outputs))
    ranks = np.arange(len(frame), dtype="float64")
    frame = frame.assign(value=ranks * 37 % 101, low=0.0, high=100.0)
    scores = select_scores(frame, "accuracy")
    profile = cProfile.Profile()
    profile.enable()
    differences = compute_start_differences(scores, find_no_examples)
    rows = _build_score_rows(scores, differences, find_no_examples)
    describe_results(scores, find_no_examples, differences)
    profile.disable()
    assert len(differences) == len(grid.cells) == len(rows) - 2
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def test_the_work_on_a_report_grows_with_its_grid_points(tmp_path: Path) -> None:
    """A frame for each point, or a comparison of each with all others, takes ten times as many calls."""
    rates = [1e-4 + n * 1e-6 for n in range(20)]
    axes = {"lmbda": [0, 0.5, 1], "beta": [0, 0.1, 0.5, 0.9, 1]}
    calls = [
        count_calls(build_grid(grid={**axes, "learning_rate": rates[:count]}), tmp_path)
        for count in (5, 5, 10, 20)
    ]
    first, second = (calls[2] - calls[1]) / 75, (calls[3] - calls[2]) / 150
    assert second < 3000
    assert second < 1.2 * first


def test_a_point_is_found_by_its_values_where_some_are_missing() -> None:
    assert _build_point_key([0.5, float("nan"), None, pd.NA, "tv", 1]) == (0.5, None, None, None, "tv", 1)
