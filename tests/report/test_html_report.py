"""The report: one page that stands alone, says what was found and shows nothing as code."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gkd_lab.config import Grid
from gkd_lab.report.html_report import write_report
from gkd_lab.report.samples import MAX_CHARACTERS, select_samples, shorten_text
from gkd_lab.store import Store

from ..tables.synthetic_store import build_grid, fill_store, write_finished_record


class Page(HTMLParser):
    """Tags with their attributes, and the text that a reader sees."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.hidden = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.hidden = tag in ("style", "title")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def report(grid: Grid, store: Store, tmp_path: Path) -> tuple[str, Page]:
    source = write_report(grid, store, tmp_path / "report.html").read_text(encoding="utf-8")
    return source, Page(source)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "outputs")


def test_the_page_asks_for_nothing_from_elsewhere(store: Store, tmp_path: Path) -> None:
    grid = build_grid()
    fill_store(grid, store)
    source, page = report(grid, store, tmp_path)
    assert not {"script", "link", "iframe", "img", "object", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    for css in re.findall(r"<style>.*?</style>", source, flags=re.DOTALL):
        assert "url(" not in css and "@import" not in css
    assert "http" not in source
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_it_says_what_lmbda_and_beta_did(store: Store, tmp_path: Path) -> None:
    grid = build_grid(description="A question.", paper={"figures": ["7", "A.14"], "claims": ["C1"]})
    fill_store(grid, store)
    _, page = report(grid, store, tmp_path)
    assert "A question." in page.text
    assert "the paper's figures 7, A.14 · claims C1" in page.text
    assert "All 9 cells are done." in page.text
    assert (
        "Best of 9: λ = 1, Forward KL with 70.0 [67.0, 73.0], 40.0 above the SFT student (30.0) "
        "and 25.0 below the teacher (95.0)." in page.text
    )
    assert (
        "At λ = 1 the 3 divergences span 4.0: from 66.0 (Reverse KL) to 70.0 (Forward KL); "
        "their intervals overlap." in page.text
    )
    assert re.search(
        r"λ = 1 against λ = 0: \+30\.0 \[\+\d+\.\d, \+\d+\.\d\] on average over 3 pairs of cells "
        r"that differ in λ only: higher \(one seed, paired bootstrap over examples\)\.",
        page.text,
    )
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert re.search(r"55\.0 52\.0 to 58\.0 bootstrap, examples 1 \+25\.0 undecided done", page.text)
    assert re.search(r"70\.0 67\.0 to 73\.0 .* 1 \+40\.0 \[\+2\d\.0, \+5\d\.0\] higher done", page.text)
    assert re.search(
        r"Against the SFT student that they started from, \d of 9 students are higher, 0 lower, \d undecided "
        r"\(9 comparisons, Holm-adjusted at 95%\)\.",
        page.text,
    )
    assert "torch 2.13.0" in page.text


def test_an_interval_that_holds_zero_is_called_undecided(store: Store, tmp_path: Path) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "seed": [0, 1]})
    fill_store(grid, store, score=lambda cell: 40.0 + (1 - 2 * cell.seed) * cell.lmbda)
    _, page = report(grid, store, tmp_path)
    assert "λ only: undecided (2 seeds, Student's t)." in page.text


def test_ten_examples_show_start_best_cell_and_teacher(store: Store, tmp_path: Path) -> None:
    grid = build_grid()
    fill_store(grid, store)
    best = grid.cells[6]
    shown = select_samples(store, best)
    assert [sample["number"] for sample in shown] == [1, 6, 11, 16, 21, 26, 31, 36, 41, 46]
    assert set(shown[0]["outputs"]) == {"start", "cell", "teacher"}
    _, page = report(grid, store, tmp_path)
    assert "Best cell: λ = 1, Forward KL, seed 0." in page.text
    assert page.text.count("1. prompt") == 5  # 1, 11, 21, 31, 41


def test_a_prediction_that_looks_like_code_is_text(store: Store, tmp_path: Path) -> None:
    grid = build_grid(description="<b>bold</b> & co")
    fill_store(grid, store, text='<script>alert("x")</script><img src=x onerror=y>')
    store.get_record(grid.cells[0]).mark_failed("<i>broken</i>", "<u>trace</u>")
    source, page = report(grid, store, tmp_path)
    assert not {"script", "img", "b", "i", "u"} & {tag for tag, _ in page.tags}
    assert '<script>alert("x")</script><img src=x onerror=y>' in page.text
    assert "&lt;script&gt;" in source
    assert "<i>broken</i>" in page.text and "<u>trace</u>" in page.text


def test_failures_are_listed_with_error_and_place(store: Store, tmp_path: Path) -> None:
    grid = build_grid()
    fill_store(grid, store, cells=grid.cells[2:])
    store.get_record(grid.cells[0]).mark_failed("RuntimeError: out of memory", "Traceback: line 1")
    bad = store.get_record(grid.cells[1])
    write_finished_record(bad, grid.cells[1], 40.0)
    bad.get_evaluation(grid.cells[1].evaluations[0]).mark_failed("ValueError: no answer")
    _, page = report(grid, store, tmp_path)
    assert "7 of 9 cells are done" in page.text
    assert "arithmetic, λ = 0, β = 0, seed 0" in page.text
    assert "RuntimeError: out of memory" in page.text and "Traceback: line 1" in page.text
    assert "ValueError: no answer" in page.text
    assert grid.cells[0].folder in page.text
    assert str(tmp_path) not in page.text


def test_with_nothing_done_it_says_so(store: Store, tmp_path: Path) -> None:
    _, page = report(build_grid(), store, tmp_path)
    assert "Nothing is done yet: none of the 9 cells has finished." in page.text
    assert "No cell of this task has a score yet" in page.text
    assert "No record yet." in page.text


def test_a_grid_of_tasks_has_a_section_with_the_headline_of_each(store: Store, tmp_path: Path) -> None:
    grid = build_grid(grid={"task": ["arithmetic", "translation"], "lmbda": [0, 1]})
    fill_store(grid, store, cells=grid.cells[:3])
    _, page = report(grid, store, tmp_path)
    assert "greedy/accuracy" in page.text and "greedy/bleu" in page.text
    assert "No pair of cells at λ = 0 and 1 is done" in page.text


def test_a_collapsed_cell_is_reported_at_each_of_its_places(store: Store, tmp_path: Path) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "temperature": [0.5, 1.0]})
    fill_store(grid, store)
    _, page = report(grid, store, tmp_path)
    for temperature in ("0.5", "1.0"):
        assert f"student 0 JSD(0.5) {temperature} 38.0 35.0 to 41.0" in page.text


def test_total_variation_is_named_and_not_taken_for_a_beta(store: Store, tmp_path: Path) -> None:
    grid = build_grid(grid={"divergence": ["tv", "jsd"], "lmbda": [0, 1], "beta": [0.5, 1]})
    failed, *others = grid.cells
    fill_store(grid, store, cells=[cell for cell in others if cell.beta != 1])
    store.get_record(failed).mark_failed("ValueError: broken")
    _, page = report(grid, store, tmp_path)
    assert "Best of 3: λ = 1, Total variation with 69.0" in page.text
    assert "from 68.0 (JSD(0.5)) to 69.0 (Total variation)" in page.text
    assert "λ = 1, Total variation, seed 0" in page.text
    assert "student 0 Total variation 0 failed student 1 Total variation 69.0 66.0 to 72.0" in page.text
    assert "arithmetic, λ = 0, total variation, seed 0" in page.text


@pytest.mark.parametrize("lmbdas", ([0], [0, 1]))
def test_losses_are_told_apart_by_their_terms(lmbdas: list[int], store: Store, tmp_path: Path) -> None:
    listed = [[{"beta": 0}], [{"beta": 0}, {"type": "adversarial", "gradient_penalty": 2, "weight": 0.5}]]
    grid = build_grid(grid={"lmbda": lmbdas, "objectives": listed})
    fill_store(grid, store)
    source, page = report(grid, store, tmp_path)
    assert "Forward KL; Forward KL + 0.5 adversarial (gradient penalty 2)" in page.text
    assert "Best of" in page.text and "accuracy by the terms of the loss" in page.text
    # A row of the table, with its score.
    assert re.search(
        r"student 0 Forward KL Forward KL \+ 0\.5 adversarial \(gradient penalty 2\) \d", page.text
    )
    assert "gradient_penalty" not in source
    assert "Each square is" not in page.text


def test_long_texts_say_how_much_was_left_out() -> None:
    assert shorten_text("a" * MAX_CHARACTERS) == "a" * MAX_CHARACTERS
    assert shorten_text("a" * (MAX_CHARACTERS + 5)).endswith("... (5 more characters)")
